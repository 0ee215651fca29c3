"""The authors' layout of URM, made here in small, read as one of our reward models."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerFast

from trueward.data.formats import DataError
from trueward.models.attribute_heads import HELPSTEER2, URM_ARCHITECTURE
from trueward.models.published_urm import load_published_urm
from trueward.models.reward_model import RewardModel
from trueward.testing import tiny_backbone, tiny_texts

WIDTH, COUNT = 32, 5
TEXTS = tiny_texts(6), tiny_texts(6, seed=4)


def published(
    folder: Path, tokenizer: PreTrainedTokenizerFast, changes: dict | None = None, shards: int = 1
) -> Path:
    """Write a folder in the published layout: a Llama, `score`, `weights.fc`, and code not to run.

    `changes` replaces head weights, or with None removes them.
    """
    backbone = tiny_backbone("llama", vocab_size=len(tokenizer))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights: dict[str, Tensor | None] = {
        f"model.{k}": v.clone() for k, v in backbone.state_dict().items()
    }
    weights["score.weight"] = normal(2 * COUNT, WIDTH)
    for layer, rows in ((0, WIDTH), (2, WIDTH), (4, COUNT)):
        # The gates are kept in half precision
        weights[f"weights.fc.{layer}.weight"] = normal(rows, WIDTH).half()
        weights[f"weights.fc.{layer}.bias"] = normal(rows).half()
    kept = {k: v for k, v in (weights | (changes or {})).items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(shards):
        names = sorted(kept)[k::shards]
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else ""
        part = {name: kept[name] for name in names}
        save_file(part, folder / (file or "model.safetensors"), metadata={"format": "pt"})
    if shards > 1:
        where = {
            name: f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
            for k in range(shards)
            for name in sorted(kept)[k::shards]
        }
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = backbone.config.to_dict() | {
        "architectures": [URM_ARCHITECTURE],
        "auto_map": {"AutoModelForSequenceClassification": f"modeling_custom.{URM_ARCHITECTURE}"},
        "id2label": {str(i): f"LABEL_{i}" for i in range(2 * COUNT)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_custom.py").write_text("raise RuntimeError('the repository ran')\n")
    tokenizer.save_pretrained(folder)
    return folder


def published_scores(folder: Path, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The authors' forward, told by SGLang's loader: weights of the last token on its means."""
    weights = load_file(folder / "model.safetensors")
    llama = AutoModel.from_pretrained(folder).eval()
    scores, variances = [], []
    for ids in rows:
        with torch.no_grad():
            states = llama(torch.tensor([ids])).last_hidden_state[0]
        state = states[-1]
        outputs = weights["score.weight"] @ state
        gates = state
        for layer in (0, 2, 4):
            weight, bias = (weights[f"weights.fc.{layer}.{k}"].float() for k in ("weight", "bias"))
            gates = weight @ gates + bias
            if layer < 4:
                gates = F.selu(gates)
        scores.append(sum(gates[i] * outputs[2 * i] for i in range(COUNT)))
        terms = [(gates[i] * outputs[2 * i + 1].exp()) ** 2 for i in range(COUNT)]
        variances.append(sum(terms))
    return torch.stack(scores), torch.stack(variances)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return published(tmp_path / "urm", tokenizer)


def test_scores_are_those_of_the_published_forward(folder: Path) -> None:
    model = load_published_urm(folder)
    tokens = [model.tokenize(p, c) for p, c in zip(*TEXTS, strict=True)]
    scores, variances = published_scores(folder, [t.prompt_ids + t.completion_ids for t in tokens])
    assert scores.std() > 0.1
    posterior = model.score(*TEXTS)
    torch.testing.assert_close(posterior.means[:, 0], scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.stds[:, 0].square(), variances, atol=1e-5, rtol=1e-5)
    assert model.head.attribute_names == HELPSTEER2
    assert not model.training


def test_a_sharded_checkpoint_gives_the_same_scores(
    tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sharded = published(tmp_path / "sharded", tokenizer, shards=3)
    one, other = (load_published_urm(path).score(*TEXTS) for path in (folder, sharded))
    assert torch.equal(one.means, other.means)


def test_stds_below_our_own_heads_floor_are_read_as_they_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    wide = 20 * torch.randn(2 * COUNT, WIDTH, generator=torch.Generator().manual_seed(1))
    model = load_published_urm(published(tmp_path, tokenizer, {"score.weight": wide}))
    state = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)) / 10
    expected = (wide @ state)[1::2]
    assert expected.min() < -5
    assert expected.max() > 2
    torch.testing.assert_close(model.head.attributes(state)[1].log(), expected)


def test_it_is_one_of_our_models_once_saved(folder: Path, tmp_path: Path) -> None:
    model = load_published_urm(folder, attributes=["a", "b", "c", "d", "e"])
    model.save_pretrained(tmp_path / "ours")
    again = RewardModel.from_pretrained(tmp_path / "ours")
    one, other = model.score(*TEXTS), again.score(*TEXTS)
    assert torch.equal(one.means, other.means)
    assert torch.equal(one.stds, other.stds)
    assert again.head.attribute_names == ("a", "b", "c", "d", "e")
    assert "auto_map" not in json.loads((tmp_path / "ours" / "config.json").read_text())


def test_a_pad_token_is_made_where_it_is_the_eos(
    tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = load_published_urm(folder).score(*TEXTS)
    tokenizer.pad_token = tokenizer.eos_token
    model = load_published_urm(published(tmp_path / "padless", tokenizer))
    assert model.tokenizer.pad_token_id != model.tokenizer.eos_token_id
    torch.testing.assert_close(model.score(*TEXTS).means, expected.means, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights.fc.2.bias": None}, r"lacking \['weights.fc.2.bias'\], unknown nothing"),
        ({"score.bias": torch.zeros(10)}, r"lacking nothing, unknown \['score.bias'\]"),
        ({"score.weight": torch.zeros(9, WIDTH)}, r"shape \(9, 32\) .* has \(10, 32\)"),
        ({"weights.fc.2.weight": torch.zeros(WIDTH, 8)}, r"fc.2.weight .* has \(32, 32\)"),
        (
            {"score.weight": torch.zeros(6, WIDTH)}
            | {"weights.fc.4.weight": torch.zeros(3, WIDTH), "weights.fc.4.bias": torch.zeros(3)},
            "has 3 attributes, but 5 names",
        ),
        ({"model.norm.weight": None}, "lacks the weights norm.weight"),
    ],
)
def test_another_layout_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, changes: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_published_urm(published(tmp_path, tokenizer, changes))


def test_what_is_no_published_urm_is_refused_with_the_remedy(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = RewardModel.from_backbone(tiny_backbone(vocab_size=len(tokenizer)), tokenizer)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(DataError, match=r"LlamaForSequence.* RewardModel.from_pretrained"):
        load_published_urm(tmp_path / "plain")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no safetensors, and trueward reads no pickles"):
        load_published_urm(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match="lacks a readable config"):
        load_published_urm(folder)
    with pytest.raises(DataError, match="give a folder, or the hub id of one"):
        load_published_urm(tmp_path / "nowhere")
