"""What lies in these folders are projects to be copied, not tests."""

collect_ignore = ["cli", "plain"]
