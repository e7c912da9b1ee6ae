import hashlib

import pytest
from golden_rule import golden_tensor, load_json

RULE = {key: case for key, case in load_json("rule_check.json").items() if not key.startswith("__all")}


@pytest.mark.parametrize("key", RULE)
def test_rule_fills_a_tensor_as_the_golden_data_was_filled(key):
    tensor = golden_tensor(key.removeprefix("small DiT "), RULE[key]["shape"])
    assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == RULE[key]["sha256"]
