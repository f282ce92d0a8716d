"""A small real policy for the Toolkit's two games of tic-tac-toe: a Llama whose vocabulary has the examples' phrases, and which
has seen random legal games. It makes mostly legal moves and no good ones, so training has something to find out.

    python tests/with_nat/small_player.py CHECKOUT --out DIR
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import itertools
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_nb.backends.local.tiny.make import CHAT_TEMPLATE, SPECIAL, warm_start

POSITIONS = 1024
INVALID = 0.15
"""Share of the turns in which a move is shown that is not legal, and the examples' complaint about it."""
COMPLAINT = "You made an invalid move. You have "
LEFT = " attempts left.\nAvailable moves are: "


def reply(row: int, column: int) -> str:
    return f"<move>\n  <row>{row + 1}</row>\n  <col>{column + 1}</col>\n</move>"


def make_tokenizer() -> Any:
    """Bytes, and a token for each move, each system prompt and each constant part of a message."""
    from rl_with_openpipe_art import llm_agents

    cells = list(itertools.product(range(3), range(3)))
    phrases = [llm_agents.SYSTEM_TEMPLATE.format(symbol=symbol) for symbol in "XO"]
    phrases += [reply(row, column) for row, column in cells]
    phrases += [f"({row + 1},{column + 1})" for row, column in cells]
    phrases += [
        "  1 2 3\n1",
        "\n2",
        "\n3",
        " _",
        " X",
        " O",
        COMPLAINT,
        LEFT,
        "\n. Current board:\n",
        "\nCurrent board:\n",
    ]
    vocabulary = {token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any) -> Any:
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def game(rng: random.Random) -> list[dict[str, str]]:
    """What one player of a game of random moves saw and said, in the words of the ART example."""
    from rl_with_openpipe_art import core, llm_agents

    symbol = rng.choice("XO")
    messages = [{"role": "system", "content": llm_agents.SYSTEM_TEMPLATE.format(symbol=symbol)}]
    board, mark = core.new_board(), 1
    while not core.check_winner(board) and not core.is_draw(board):
        free = core.available_moves(board)
        move = rng.choice(free)
        if (mark == 1) == (symbol == "X"):
            shown = core.board_to_str(board)
            messages.append({"role": "user", "content": shown})
            taken = [cell for cell in itertools.product(range(3), range(3)) if cell not in free]
            if taken and rng.random() < INVALID:
                listed = ", ".join(f"({row + 1},{column + 1})" for row, column in free)
                again = f"{COMPLAINT}2{LEFT}{listed}\n. Current board:\n{shown}"
                messages.append({"role": "assistant", "content": reply(*rng.choice(taken))})
                messages.append({"role": "user", "content": again})
            messages.append({"role": "assistant", "content": reply(*move)})
        board[move] = mark
        mark = -mark
    return messages


def make_player(directory: Path, games: int = 2500, steps: int = 300, seed: int = 0) -> Path:
    """Writes the model to `directory`, with its tokenizer. The ART example can be imported."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    rows = [tokenizer.apply_chat_template(game(rng), return_dict=False) for _ in range(games)]
    model = make_model(tokenizer)
    warm_start(model, tokenizer, rows, rng, steps, batch=16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of NVIDIA/NeMo-Agent-Toolkit")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout / "examples/finetuning/rl_with_openpipe_art/src"))
    make_player(arguments.out, steps=arguments.steps, seed=arguments.seed)
