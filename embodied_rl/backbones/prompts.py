"""Instructions to token ids, with a `tokenizer.json` that the user supplies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from torch import Tensor

from embodied_rl.errors import UserError

FILE = "tokenizer.json"
BOS = "<bos>"


def find_tokenizer(folder: Path, given: str | None, repo: str, gated: bool = True) -> Path:
    """Returns the path of a tokenizer file.

    Args:
        folder: the policy's folder, searched when nothing is given; then the local Hub cache.
        given: `policy.tokenizer`, a folder or a file.
        repo: Hub repository that has the right one, for the cache and the message.
        gated: whether that repository asks for its licence to be accepted.

    Raises:
        UserError: it is in none of these places; says where to get it.
    """
    start = folder if given is None else Path(given).expanduser()
    path = start / FILE if start.is_dir() else start
    if path.is_file():
        return path
    if given is None:
        cached = try_to_load_from_cache(repo, FILE)
        if isinstance(cached, str) and Path(cached).is_file():
            return Path(cached)
    looked = f"{folder / FILE}" if given is None else f"policy.tokenizer={given}"
    terms = f", which is gated: accept its licence at https://huggingface.co/{repo}, fetch"
    raise UserError(
        f"no tokenizer: {looked} does not exist. The policy reads its instructions with the "
        f"tokenizer of {repo}{terms if gated else '. Fetch'} the file with "
        f"`hf download {repo} {FILE} --local-dir <folder>`, and set "
        f"policy.tokenizer=<folder>/{FILE} (or put it into the policy's folder)."
    )


def load_tokenizer(path: Path, bos: str | None = BOS) -> Tokenizer:
    """Reads a tokenizer file.

    Args:
        path: the file.
        bos: token that prompts begin with; None: whatever the file itself adds.

    Raises:
        UserError: the file is none, or has no such token.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception
        raise UserError(
            f"{path} is damaged or no tokenizer file of the `tokenizers` library ({error}). "
            "Fetch it again, or name another with policy.tokenizer."
        ) from None
    if bos is not None and tokenizer.token_to_id(bos) is None:
        raise UserError(
            f"{path} has no {bos} token, so it is not the tokenizer that the policy was trained "
            "with. Name the right one with policy.tokenizer."
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(
    tokenizer: Tokenizer,
    instructions: Sequence[str],
    max_length: int,
    vocabulary: int,
    bos: str | None = BOS,
) -> list[list[int]]:
    r"""Returns token ids of `<bos>instruction\n` for each instruction, unpadded.

    Args:
        tokenizer: from `load_tokenizer`.
        instructions: texts.
        max_length: tokens that a prompt may have, as many as the policy was trained with.
        vocabulary: number of rows of the policy's embedding table.
        bos: as in `load_tokenizer`.

    Raises:
        UserError: a prompt is too long or has tokens that the policy does not know.
    """
    prompts: list[list[int]] = []
    for text in instructions:
        line = text if text.endswith("\n") else f"{text}\n"
        start = [] if bos is None else [tokenizer.token_to_id(bos)]
        ids = [*start, *tokenizer.encode(line, add_special_tokens=bos is None).ids]
        if len(ids) > max_length:
            raise UserError(
                f"the instruction {text!r} has {len(ids)} tokens; the policy was trained with at "
                f"most {max_length}. Shorten it."
            )
        if max(ids) >= vocabulary:
            raise UserError(
                f"the tokenizer gives token {max(ids)} for {text!r}, but the policy's vocabulary "
                f"ends at {vocabulary - 1}: it is another model's. Set policy.tokenizer."
            )
        prompts.append(ids)
    return prompts


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pads prompts on the right to the longest.

    Returns:
        token ids [I, L] and mask [I, L], both int64; I instructions, L tokens.
    """
    length = max(map(len, prompts), default=0)
    ids = [[*p, *[0] * (length - len(p))] for p in prompts]
    mask = [[1] * len(p) + [0] * (length - len(p)) for p in prompts]
    shape = (len(prompts), length)
    return (
        torch.tensor(ids, dtype=torch.int64).reshape(shape),
        torch.tensor(mask, dtype=torch.int64).reshape(shape),
    )
