"""The benchmark of distillation beside TRL's."""

import pytest

from benchmarks import distillation
from benchmarks.trainers import model_folder


def test_both_heads_compute_the_same_loss_before_they_are_timed(tmp_path):
    pytest.importorskip("trl")
    student = model_folder("tiny", tmp_path)
    teacher = distillation.teacher_folder(student, tmp_path)
    settings = {"device": "cpu", "beta": 0.5, "student": str(student), "teacher": str(teacher)}
    theirs, ours = distillation.measure_head(settings, 1)
    assert (theirs["provider"], ours["provider"]) == ("trl", "fastpref") and len(ours["seconds"]) == 1
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=distillation.LOSS_TOLERANCE["cpu"])
