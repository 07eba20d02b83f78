"""A study: settings are trained on a project's own clients, and the measured losses decide which one is best."""

from lightning_fedscale.study.answer import Answer, Result
from lightning_fedscale.study.answer_page import page, sentences, write
from lightning_fedscale.study.methods import METHODS
from lightning_fedscale.study.settings import Setting
from lightning_fedscale.study.study import size
from lightning_fedscale.study.sweeping import sweep

__all__ = ["METHODS", "Answer", "Result", "Setting", "page", "sentences", "size", "sweep", "write"]
