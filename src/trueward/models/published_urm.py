"""The uncertainty-aware reward models (URM) that their authors published, as ours.

The layout of `LxzGordon/URM-LLaMa-3.1-8B` (https://huggingface.co/LxzGordon/URM-LLaMa-3.1-8B), for
`m` attributes and states of width `d`:

- `model.*`: a Llama;
- `score.weight`, `[2 m, d]`, no bias: mean and log std of each attribute in turn;
- `weights.fc.{0,2,4}.{weight,bias}`: the gating network, linear d -> d, SELU, d -> d, SELU, d -> m.

The reward is `sum_i w_i mu_i` at the last token, without a softmax on the gates.

Where this was found: names, shapes, activations and the missing softmax in SGLang's loader for the
architecture (`python/sglang/srt/models/llama_reward.py`), whose test wants its scores within 0.04
of the checkpoint's under transformers (float16), and in its test of the weights' names; an
independent reimplementation of the gating layers has the same. The order of the attributes is that
of the model card's sentence. That the second of each pair is the
*log* of a std is the paper's Section 4.1, `N(mu, exp(2 s))`, as secondary sources tell it: no
reader of the score uses it.

Not verified: the checkpoint itself was not downloaded, so neither the card's scores (2.3285 and
12.4380 for its two answers) nor the attributes' order was reproduced. The card's example renders
the chat template and then tokenises the text with special tokens, which may read a second BOS;
trueward reads one. The authors compute the gates in float16, trueward in float32.
`LxzGordon/URM-LLaMa-3-8B` has, by its card, fixed weights in place of gates, and is refused.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from trueward.data.formats import DataError
from trueward.data.tokens import ensure_pad_token
from trueward.models.attribute_heads import HELPSTEER2, URM_ARCHITECTURE, AttributeHeads
from trueward.models.backbone import default_device, disable_dropout, grow_vocabulary
from trueward.models.reward_model import RewardModel

# Everything but code and pickles.
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_GATING = [f"{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")]
_HEAD = {"score.weight", *(f"weights.fc.{name}" for name in _GATING)}
# The authors clamp nothing; these limits keep exp() finite and positive in float32.
_LOG_STD_RANGE = (-20.0, 20.0)


def load_published_urm(
    path: str | Path,
    *,
    attributes: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> RewardModel:
    """Read a gated URM in its authors' layout; its own code is neither fetched nor run.

    The result is a `RewardModel` with `AttributeHeads`, and `save_pretrained` writes it in our
    layout, which `RewardModel.from_pretrained` reads.

    Args:
        path: A folder, or a hub id, of which only safetensors, JSON and the tokenizer are fetched.
        attributes: Names of the outputs, in order; None for HelpSteer2's five.
        dtype: Of the backbone; the head is float32.
        device: None for the accelerator, if there is one.

    Raises:
        DataError: There is no such model, or its layout is another.
    """
    folder = _folder(path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"No published URM could be read from {path}: it lacks a readable config.json or "
            "tokenizer."
        ) from error
    kinds = list(config.architectures or [])
    if URM_ARCHITECTURE not in kinds:
        raise DataError(
            f"{path} holds a {kinds[0] if kinds else 'model of no stated architecture'}, not a "
            f"{URM_ARCHITECTURE}: read other reward models with RewardModel.from_pretrained."
        )
    head = _head(path, _head_weights(path, folder), config.hidden_size, attributes)
    backbone, info = AutoModel.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise DataError(
            f"{path} lacks the weights {', '.join(missing[:3])}{' ...' * (len(missing) > 3)} of "
            "its Llama: fetch it again."
        )
    if hasattr(backbone.config, "auto_map"):  # a model saved by us has no code of its own
        del backbone.config.auto_map
    ensure_pad_token(tokenizer)
    grow_vocabulary(backbone, len(tokenizer))
    disable_dropout(backbone)
    model = RewardModel(backbone, head, tokenizer)
    model.facts = {"base": str(path), "attributes": ", ".join(head.attribute_names)}
    return model.eval().to(device or default_device())


def _folder(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"No published URM could be read from {path}: give a folder, or the hub id of one."
        ) from error


def _head_weights(path: str | Path, folder: Path) -> dict[str, Tensor]:
    """Read `score.*` and `weights.*` from the folder's safetensors, sharded or not."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(
            f"{path} has no safetensors, and trueward reads no pickles: convert its weights first."
        )
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                if key.startswith(("score.", "weights.")):
                    found[key] = tensors.get_tensor(key).float()
    if set(found) != _HEAD:
        raise DataError(
            f"The head of {path} has not the published layout: "
            f"lacking {sorted(_HEAD - set(found)) or 'nothing'}, "
            f"unknown {sorted(set(found) - _HEAD) or 'nothing'}."
        )
    return found


def _head(
    path: str | Path,
    weights: dict[str, Tensor],
    hidden_size: int,
    attributes: Sequence[str] | None,
) -> AttributeHeads:
    count, width = len(weights["weights.fc.4.weight"]), len(weights["weights.fc.0.weight"])
    wanted = {
        "score.weight": (2 * count, hidden_size),
        "weights.fc.0.weight": (width, hidden_size),
        "weights.fc.2.weight": (width, width),
        "weights.fc.4.weight": (count, width),
    }
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise DataError(
                f"{name} of {path} has the shape {tuple(weights[name].shape)} where the published "
                f"layout has {shape}."
            )
    if attributes is None:
        attributes = HELPSTEER2
    if len(attributes) != count:
        raise DataError(
            f"{path} has {count} attributes, but {len(attributes)} names: give `attributes` with "
            "one name for each."
        )
    head = AttributeHeads(hidden_size, attributes, gate_width=width, log_std_range=_LOG_STD_RANGE)
    with torch.no_grad():
        head.linear.weight.copy_(weights["score.weight"])
        head.linear.bias.zero_()
    head.gating.load_state_dict({name: weights[f"weights.fc.{name}"] for name in _GATING})
    return head
