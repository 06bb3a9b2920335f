"""A `classifier` criterion and a real vLLM server: its scores are those of the model itself."""

import json

import numpy as np
import pytest
import torch
from judge_helpers import make_model_folder, make_pool
from tiny_run import SIP

from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.recipe import load_config
from megatron_sip.services import served_model
from megatron_sip.serving.text_fleet import text_fleet

pytestmark = pytest.mark.full
CLASSES = 3
PREFIX = "the world of words "
TEXTS = ["goes on and on", "Yes No", "of the world", "on"]


@pytest.fixture(scope="module")
def model(workplace):
    """A random Llama that gives three numbers for a text; its folder has no chat template."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = make_model_folder(workplace.folder / "classifier")
    (folder / "chat_template.jinja").unlink()
    torch.manual_seed(0)
    description = LlamaConfig(
        vocab_size=400, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, num_labels=CLASSES, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(description).eval()
    model.save_pretrained(folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, model


def test_scores_of_both_routes_are_the_model_s(workplace, model):
    folder, network = model
    criteria = [
        {"form": "classifier", "name": f"class_{i}", "server": "reward", "route": "classify",
         "output": i} for i in range(CLASSES)
    ]  # fmt: skip
    criteria.append(criteria[2] | {"name": "number", "route": "pooling"})
    server = SIP["servers"]["judge"] | {"model": str(folder), "max_model_len": 256}
    recipe = workplace.recipe(
        SIP,
        "classified",
        servers__reward=server,
        judge__criteria=criteria,
        judge__cache_dir=str(workplace.folder / "classified-cache"),
    )
    config = load_config(recipe)
    cache = Cache(config.judge.cache_dir)
    with text_fleet(config, ["reward"], log_dir=workplace.folder / "logs", say=print) as servers:
        served = served_model(config, "reward", servers.endpoints()["reward"])
        judge = Judge(
            config.judge.criteria, servers={"reward": served}, cache=cache, settings=config.judge,
            prefix_text=lambda sample, n: PREFIX, suffix_text=lambda sample: "",
        )  # fmt: skip
        (scores,), _, counts = judge.judge_pools([make_pool(TEXTS, prefix=PREFIX)], seed=1)
    cache.close()
    assert counts["missing"] == 0 and counts["verdicts"] == len(TEXTS) * len(criteria)
    for i, text in enumerate(TEXTS):
        ids, _ = served.tokenizer.encode_continuation(PREFIX, continuation=text)
        with torch.no_grad():
            numbers = network(torch.tensor([ids])).logits[0].double()
        wanted = numbers.softmax(0).tolist()
        found = [scores.by_criterion[f"class_{n}"][i] for n in range(CLASSES)]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert np.ptp(wanted) > 0.01
        number = scores.by_criterion["number"][i]
        np.testing.assert_allclose(number, float(numbers[2]), rtol=1e-3, atol=1e-3)
