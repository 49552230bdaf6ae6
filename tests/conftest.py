"""What all tests share: tiny real models, real data if it lies beside the checkout, ranks as processes, one Ray session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
WORDS = [f"w{number}" for number in range(60)]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no real models and data beside the checkout (../shared)")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand random parameters with a word tokenizer (bos, eos, pad), saved as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of random parameters (a Llama with one output) with the word tokenizer and a chat template, as a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("tiny_scorer")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3, num_labels=1,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model`, with layers of 64 and 128 inputs: those can be held in 4 bits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide_model")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def pad_is_eos(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """`pad_is_eos(tied)`: a policy as most chat models are: pad = eos, several stop tokens in generation_config.json."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def made(tied: bool = False) -> Path:
        folder = tmp_path / "pad_is_eos"
        model = AutoModelForCausalLM.from_pretrained(tiny_model, pad_token_id=2, tie_word_embeddings=tied)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model, pad_token="</s>").save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "pad_token_id": 2}))
        return folder

    return made


@pytest.fixture
def train_judge(plain_rank: Any, tmp_path: Path) -> Callable[..., Path]:
    """`train_judge(model, name, **settings of its section)`: a reward model after two steps; its folder holds `export` and `checkpoint`."""
    from rlhf_dist.config.reward_model import RewardModelConfig
    from rlhf_dist.contracts.roles import UpdateRequest
    from rlhf_dist.workers.reward_model import build_reward_model

    def trained(model: Path, name: str = "judge", **settings: Any) -> Path:
        rows = [{"prompt": f"w{n} w3", "chosen": f" w{n + 1} w2" + " w4" * n, "rejected": " w9"} for n in range(4)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = {"model": str(model), "optim": {"lr": 0.03}} | settings
        values = {"data": {"train": str(tmp_path / "pairs.jsonl"), "max_tokens": 32}, "model": section, "training": {"max_steps": 9}}
        worker = build_reward_model(RewardModelConfig.model_validate(values), plain_rank)
        for _ in range(2):
            worker.update(UpdateRequest(((0, 1, 2, 3),), 4.0))
        worker.export(str(tmp_path / name / "export"))
        worker._engine.begin_save(tmp_path / name / "checkpoint")
        worker._engine.saved(wait=True)
        return tmp_path / name

    return trained


def word_tokenizer() -> Any:
    """`<pad> <s> </s> <unk>` and sixty words; `<s>` is put in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty prompts of one to six words, with an `answer` column."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": " ".join(WORDS[(n * 7 + k) % 60] for k in range(1 + n % 6)), "answer": WORDS[n]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's module with a few rewards."""
    path = tmp_path_factory.mktemp("user") / "user_rewards.py"
    path.write_text(
        "def even(prompts, completions, **columns):\n"
        "    return [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[1:].isdigit()) / (1 + len(c.split())) for c in completions]\n"
        "def short(prompts, completions, **columns):\n"
        "    return [len(completions)] and [0.0]\n"
        "def text(prompts, completions, **columns):\n"
        "    return ['good' for _ in completions]\n"
        "def nan(prompts, completions, **columns):\n"
        "    return [float('nan') for _ in completions]\n"
        "def abstains(prompts, completions, **columns):\n"
        "    return [None for _ in completions]\n"
    )
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path, prompts_file: Path, reward_file: Path) -> Callable[[Path], dict[str, Any]]:
    """`tiny_run(folder)`: a config of a tiny run in one plain process, as plain values to change and validate."""

    def values(folder: Path) -> dict[str, Any]:
        return {
            "run": {"name": "test", "output_dir": str(folder / "runs"), "steps": 2, "seed": 3},
            "data": {"train": str(prompts_file), "eval_fraction": 0.25, "max_prompt_tokens": 16},
            "policy": {"model": str(tiny_model), "optim": {"lr": 1e-3}},
            "value": {"optim": {"lr": 1e-3}},
            "reward": {"sources": [{"name": "even", "kind": "function", "path": f"{reward_file}:even"}]},
            "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 12, "slots": 8},
            "algorithm": {"epochs": 2, "minibatches": 2},
            "placement": {"launcher": "spmd"},
        }

    return values


@pytest.fixture
def ppo_values(tiny_run: Callable[[Path], dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """A config of a tiny run in one plain process, as plain values to change and validate."""
    return tiny_run(tmp_path)


@pytest.fixture(scope="session")
def rlhf_dist_ppo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`rlhf_dist_ppo(values, "key=value", ...)`: `rlhf-dist ppo` in this process, on a YAML file of the values; returns the run folder."""

    def run(values: dict[str, Any], *overrides: str) -> Path:
        import yaml

        from rlhf_dist.cli.main import main

        config = tmp_path_factory.mktemp("config") / "config.yaml"
        config.write_text(yaml.safe_dump(values))
        main(["ppo", "--config", str(config), *overrides])
        return Path(values["run"]["output_dir"]) / values["run"]["name"]

    return run


@pytest.fixture
def plain_rank() -> Any:
    """This process as the only rank. It joins anew where an earlier test left the group; what it sets in the environment goes again."""
    from rlhf_dist.engines.process import LAUNCH_VARIABLES, free_port, start_process_group

    before = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    yield start_process_group(0, 1, 0, "127.0.0.1", free_port())
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks(script, world_size, *arguments)`: see `Ranks.run`."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks.run
    ranks.close()


class Ranks:
    """Processes forked off one that has imported everything (programs/ranks.py)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._template: subprocess.Popen[str] | None = None

    def run(self, script: Path, world_size: int, *arguments: str, timeout: float = 240) -> list[Any]:
        """Runs a script as the ranks of one process group (RANK, WORLD_SIZE, MASTER_* set); returns what each printed last, as JSON."""
        from rlhf_dist.engines.process import free_port

        common = os.environ | {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "PYTHONPATH": str(ROOT),
        }
        said = [{kind: self._folder / f"rank{rank}.{kind}" for kind in ("out", "err")} for rank in range(world_size)]
        ranks = [
            {"environment": common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}} | {kind: str(path) for kind, path in files.items()}
            for rank, files in enumerate(said)
        ]
        statuses = self._answer(json.dumps({"script": str(script), "arguments": arguments, "ranks": ranks}), timeout)
        for status, files in zip(statuses, said, strict=True):
            out, err = files["out"].read_text()[-2000:], files["err"].read_text()[-4000:]
            assert status == 0, f"{script.name}: rank failed with {status}\n{out}\n{err}"
        return [json.loads(files["out"].read_text().strip().splitlines()[-1]) for files in said]

    def close(self) -> None:
        """Ends the process and those it has forked."""
        if self._template is not None:
            os.killpg(self._template.pid, signal.SIGKILL)
            self._template.wait()
            self._template = None

    def _answer(self, job: str, timeout: float) -> list[int]:
        if self._template is None:
            self._template = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "programs" / "ranks.py")], text=True, start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        template = self._template
        assert template.stdin is not None and template.stdout is not None
        overdue = threading.Timer(timeout, self.close)
        overdue.start()
        try:
            template.stdin.write(job + "\n")
            template.stdin.flush()
            answer = template.stdout.readline()
        except OSError:
            answer = ""
        finally:
            overdue.cancel()
        if not answer:
            self.close()  # the next job gets a new one
            said = "".join(f"\n{path.name}: {path.read_text()[-1500:]}" for path in sorted(self._folder.iterdir()))
            raise AssertionError(f"the ranks did not end within {timeout:g} s, or their template died{said}")
        statuses: list[int] = json.loads(answer)
        return statuses


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray cluster for all tests that need one, with more CPUs declared than there are."""
    import ray

    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
