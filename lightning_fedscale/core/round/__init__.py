"""One fit, round by round.

The strategy calls `Federation`. It owns one `Fit`, the parts that live from the first round to the last. From these it
makes an `OpenRound` and then a `RoundRunner` for each round, and a `FederationCheckpoint` that saves and loads.
None of these knows another one; each part of `Fit` has a class that says which data it owns.

**A round.** Time runs down, ranks are next to each other, and the method is on the right. Only the line of stars
crosses ranks; before it, the clients' states have moved to the ranks that train them (`ClientStates.fetch`)::

    the Trainer           rank 0                 rank 1
    -------------------   --------------------   --------------------
    next batch            plan: 3, 7, 9, 12      the same plan          Federation.open_round
                          a batch of client 3    a batch of client 7    OpenRound.begin
    batch to the device   drawn as client 3      drawn as client 7      OpenRound.arrived
    optimization loop     the global model, as a vector                 RoundRunner.__init__
      |                   client 3               client 7                 SequentialExecutor.run, or
      |                     batch batch batch      batch batch            VectorizedExecutor.run
      |                     -> update              -> update
      |                   client 12              client 9
      |                     batch                  batch batch batch
      |                     -> update              -> update
      |                   sums and table         sums and table           RoundAccumulator.add, ClientRows.add
      |                   ***** one sum over both ranks *****             RoundAccumulator.merge
      |                   aggregate -> delta, the same on both            GlobalModel.aggregate
      |                   server step -> the next global model            GlobalModel.move
      |                   the states that are kept become valid           RoundRunner._commit
    counters, schedules   log, callbacks                                Federation.end_round

If anything fails between the first client and the end of the server's step, the module and all kept states are as
before the round (`RoundRunner._undone_on_failure`), on every rank.

**A wave.** If clients are vectorized, a rank trains several at once. Rows are clients, columns are local steps, and
numbers are the samples of a batch. Batches in one box have the same shapes and share one call of ``training_step``
under `torch.func.vmap`; a client without further batches stops early, and ``round/padding`` counts the dots::

    step             0       1       2       3
                  +-----+ +-----+ +-----+ +-----+
    client 3      |  8  | |  8  | |  8  | |  8  |
                  |     | |     | |     | +-----+
    client 7      |  8  | |  8  | |  8  | |  5  |    its last batch is smaller: a separate call
                  |     | |     | +-----+ +-----+
    client 9      |  8  | |  8  | |  2  |    .
                  |     | +-----+ +-----+
    client 12     |  8  | |  1  |    .       .
                  +-----+ +-----+

When all have stopped, their updates are treated as those of sequential clients; the next wave reuses the memory.

**From the strategy to the user's training_step**, each method calls the next::

    strategy.py                    FederatedStrategy._open_fit
    core/lightning/round_loops.py  _RoundAutomatic.run
    core/round/federation.py       Federation.run_round
    core/round/run.py              RoundRunner.run
    core/round/run.py              RoundRunner._train_and_merge
    core/round/run.py              RoundRunner._train_clients
    core/executors/auto.py         ExecutorChoice.run
    core/executors/sequential.py   SequentialExecutor.run
    core/executors/sequential.py   SequentialExecutor._train
    core/executors/fast_step.py    FastStep.step
    core/executors/fast_step.py    FastStep._forward_backward
    core/executors/fast_step.py    FastStep._forward
"""
