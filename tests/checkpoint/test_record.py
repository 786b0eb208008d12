import json
from pathlib import Path

import pytest

import jaxgrad as jg
from jaxgrad._checkpoint.record import (
    Empty,
    Position,
    Record,
    Settings,
    StepRecord,
    UnreadableError,
    best_first,
)
from jaxgrad._optim.parts import Part

PLAIN = Record(
    trained=("head/bias",),
    config={"classes": 3, "hidden": [4, 5]},
    keys={"key": "fry"},
    empty={"none": Empty("bfloat16", (0, 3))},
    checksums={"head/bias": 7},
)
STEP = StepRecord(
    step=12,
    trained=("head/bias",),
    settings=Settings(22, 5, "fry [0, 1]", {"x": "float32[22,3] 9f86d081884c7d65"}),
    staged=None,
    positions=(Position(1, 2, 10, {"base64": "AA=="}), Position()),
    parts={"0/mu": Part("Adam.mu", None), "0/count": Part("Adam.count", ("head/bias",))},
    frozen="3f",
    metric="accuracy",
    mode="max",
    history='[{"step": 12, "accuracy": 0.5}]',
)


@pytest.mark.parametrize("record", [Record(), PLAIN, STEP], ids=["empty", "plain", "step"])
def test_every_field_comes_back_as_it_was(record):
    metadata = json.loads(json.dumps(record.to_metadata()))
    back = Record.from_metadata(metadata, Path("runs/a"))
    assert back == record and type(back) is type(record)


def test_the_history_of_a_step():
    assert STEP.entries == ({"step": 12, "accuracy": 0.5},)
    assert STEP.metrics_of("accuracy") == {12: 0.5} and STEP.metrics_of("loss") == {}


@pytest.mark.parametrize("metadata", [None, {}, {"step": 3}, {"record": {"trained": 1}}, [1, 2]])
def test_what_others_wrote_beside_their_arrays_is_not_a_record(metadata):
    assert Record.from_metadata(metadata, Path("runs/a")) == Record()


@pytest.mark.parametrize(("version", "shown"), [(3, "3"), (1, "1"), (0, "0"), (None, "None")])
def test_another_format_version_is_named_with_what_to_do(version, shown):
    fields = json.loads(PLAIN.to_json()) | {"version": version, "of the future": 1}
    with pytest.raises(UnreadableError) as info:
        Record.from_json(json.dumps(fields), Path("runs/a"))
    assert str(info.value) == (
        f"the record of 'runs/a' has format version {shown}, and this jaxgrad reads version 2. "
        "Read it with the jaxgrad that wrote it, or install the newest."
    )
    assert isinstance(info.value, jg.CheckpointError)


def test_a_damaged_record_is_an_error():
    metadata = PLAIN.to_metadata()
    metadata["record"] = metadata["record"].replace('"classes": 3', '"classes": 4')
    with pytest.raises(jg.CheckpointError, match="'runs/a' is damaged: the checksum of its record"):
        Record.from_metadata(metadata, Path("runs/a"))


def test_the_best_step_is_the_earliest_of_equals_and_never_nan():
    metrics = {9: 1.0, 3: 1.0, 6: 2.0, 1: float("nan")}
    assert best_first(metrics, "min") == [3, 9, 6]
    assert best_first(metrics, "max") == [6, 3, 9]
