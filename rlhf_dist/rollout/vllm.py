"""The vLLM rollout engine: token ids in and out, weights pushed in buckets. The only file that imports vllm, and only where it is used.

vLLM's pins differ from ours, so it lives in an environment of its own (`launch/vllm_env.sh`), in an actor of its own: what this module
imports is what that environment has. The engine runs inside the calling process.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from rlhf_dist.config.engines import Dtype
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.rollout import VLLM_TEMPERATURES
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.models.checksum import MODULUS, checksum
from rlhf_dist.rollout.native import Completion, RolloutRow, RunningRow, SamplingKey, diverged
from rlhf_dist.rollout.sampling import SamplingParams
from rlhf_dist.rollout.stopping import Decode, StopRule
from rlhf_dist.rollout.weight_shapes import weight_shapes

PREFILL_TOKENS = 8192
DTYPES: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
GIB = 2**30
LEAST_SHARE = 0.01
SYNC = "weight sync"


@dataclass(frozen=True)
class VllmSettings:
    """What the engine is built from.

    model: a Hugging Face folder with safetensors. dtype: of its weights and of decoding. max_model_len: longest row, prompt and completion
    together. slots: rows decoded side by side at most. memory_share: of the device's memory, weights and key/value cache together;
    kv_cache_gib: the key/value cache alone; one of the two. sleep: whether `VllmEngine.sleep` will be used.

    Raises:
        UserError: a value outside its range, neither or both of memory_share and kv_cache_gib.
    """

    model: str
    max_model_len: int
    dtype: Dtype = "fp32"
    slots: int = 256
    memory_share: float | None = None
    kv_cache_gib: float | None = None
    trust_remote_code: bool = False
    sleep: bool = False

    def __post_init__(self) -> None:
        _require(self.max_model_len >= 2, f"max_model_len is {self.max_model_len}", "allow a prompt and a completion of one token at least")
        _require(self.slots >= 1, f"slots is {self.slots}", "set it to at least 1")
        both = self.memory_share is not None, self.kv_cache_gib is not None
        _require(sum(both) == 1, f"{'both' if all(both) else 'neither'} of memory_share and kv_cache_gib are set", "set one of them")
        share = 0.5 if self.memory_share is None else self.memory_share
        gib = 1.0 if self.kv_cache_gib is None else self.kv_cache_gib
        _require(0 < share < 1, f"memory_share is {share}", "set it between 0 and 1")
        _require(gib > 0, f"kv_cache_gib is {gib}", "set it above 0")


class WeightReceiver:
    """What our weights need of a vLLM worker: it is mixed into vLLM's worker class, whose methods and attributes it uses.

    vLLM keeps linear layers in the layout of its kernels. Its layer-wise reload takes weights under Hugging Face names in any order and
    rebuilds a layer once all its parts are there.
    """

    def open_weight_sync(self) -> None:
        """An update begins."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self._receiving_model())

    def receive_bucket(self, bucket: Mapping[str, Tensor]) -> int:
        """Loads some weights; their checksum as they arrived, before any change of precision."""
        with torch.no_grad():
            self._receiving_model().load_weights(iter(bucket.items()))
        return checksum(bucket.items())

    def close_weight_sync(self) -> None:
        """All weights have come."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        worker: Any = self
        model = self._receiving_model()
        finalize_layerwise_reload(model, worker.model_config)
        _rebuild_tied(model)

    def _receiving_model(self) -> Any:
        worker: Any = self
        return worker.model_runner.get_model()


def _rebuild_tied(model: Any) -> None:
    """vLLM's reload rebuilds the layer that a weight was sent to, not one that shares it: on CPUs a tied head kept its old packed copy."""
    seen: set[int] = set()
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and id(weight) in seen:
            layer.quant_method.process_weights_after_loading(layer)
        seen.add(id(weight))


@dataclass
class _Sync:
    """An update of the weights that is under way."""

    arrived: set[str] = field(default_factory=set)
    checksum: int = 0


class VllmEngine:
    """Samples completions with vLLM; keeps the contract of `NativeEngine`, but for top-k and top-p, which it refuses. One a process.

    Args:
        settings: what to build.
        decode: token ids to text; needed with stop strings.

    Raises:
        UserError: vLLM is not installed, it refuses the model or the settings, or the model's folder holds no safetensors.
    """

    def __init__(self, settings: VllmSettings, *, decode: Decode | None = None) -> None:
        self._decode, self._max_model_len, self._may_sleep = decode, settings.max_model_len, settings.sleep
        self._shapes = weight_shapes(settings.model)
        self._llm = _build(settings)
        self._numbers = itertools.count()
        self._version: int | None = None
        self._sync: _Sync | None = None
        self._asleep = False

    @property
    def version(self) -> int | None:
        """The version of the last complete update; None while the weights are those of the model folder."""
        return self._version

    def generate(self, rows: Sequence[RolloutRow], params: SamplingParams, key: SamplingKey) -> tuple[list[Completion], Tally]:
        """Completes every row; the completions stand in the order of the rows.

        Log-probs are those of log_softmax(logits / temperature), in nats. A row's random numbers come from vLLM's own generator, seeded by
        the key, the prompt id and the sample index: not those of `NativeEngine`. The tally holds `rollout/rows_per_step`.

        Raises:
            UserError: top-k or top-p, a temperature that vLLM would change, an empty prompt, a row longer than max_model_len, stop strings
                without `decode`, log-probs that are not finite, an engine that sleeps or whose weights are half updated.
        """
        self._check_awake()
        if self._sync is not None:
            raise UserError("an update of vLLM's weights is not finished", where=SYNC, fix="send all weights and call finish_sync first")
        _check_params(params)
        rule = StopRule(params, self._decode)
        limits = [self._limit(row, params) for row in rows]
        # Where a stop string can end a row, every token is looked at as it comes; elsewhere vLLM hands over finished rows.
        requests = [_request(row, limit, params, key) for row, limit in zip(rows, limits, strict=True)]
        return self._run(rows, requests, [RunningRow(i, limit) for i, limit in enumerate(limits)], rule)

    def load_bucket(self, bucket: Mapping[str, Tensor]) -> None:
        """Takes some of the weights, under the names of the model's export, adapters merged. They must not change before `finish_sync`.

        Raises:
            UserError: the model has no weight of such a name or shape, one came twice in this update, or the engine sleeps.
        """
        self._check_awake()
        if self._sync is None:
            self._on_workers("open_weight_sync")
            self._sync = _Sync()
        self._check_bucket(bucket, self._sync.arrived)
        (received,) = self._on_workers("receive_bucket", dict(bucket))
        self._sync.arrived |= bucket.keys()
        self._sync.checksum = (self._sync.checksum + received) % MODULUS

    def finish_sync(self, version: int) -> int:
        """Ends an update: the next samples are of this version. Returns the checksum of the weights that came.

        Raises:
            UserError: a weight did not come. The update stays open for it.
        """
        sync = self._sync or _Sync()
        missing = sorted(self._shapes.keys() - sync.arrived)
        if missing:
            raise _mismatch(f"lacks {len(missing)} of {len(self._shapes)} weights, {missing[0]} first")
        self._on_workers("close_weight_sync")
        # Prefixes are not cached, so no key or value of older weights outlives this.
        self._sync, self._version = None, version
        return sync.checksum

    def sleep(self) -> None:
        """Moves the weights to the host and gives the key/value cache's memory back, until `wake`.

        Raises:
            UserError: the engine was not built for it.
        """
        if not self._may_sleep:
            raise UserError("this vLLM engine was built without sleep mode", where="rollout", fix="build it with sleep=True, on a GPU")
        self._llm.sleep(level=1)
        self._asleep = True

    def wake(self) -> None:
        """Ends `sleep`."""
        if self._asleep:
            self._llm.wake_up()
        self._asleep = False

    def close(self) -> None:
        """Ends the engine and gives its memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def _limit(self, row: RolloutRow, params: SamplingParams) -> int:
        limit = row.limit(params)
        length = len(row.prompt_tokens) + limit
        if length > self._max_model_len:
            fix = "shorten data.max_prompt_tokens or rollout.max_new_tokens, or raise max_model_len"
            raise UserError(
                f"prompt and completion may take {length} tokens, max_model_len is {self._max_model_len}", where=row.where, fix=fix
            )
        return limit

    def _run(
        self, rows: Sequence[RolloutRow], requests: Sequence[Any], running: Sequence[RunningRow], rule: StopRule
    ) -> tuple[list[Completion], Tally]:
        engine, tally = self._llm.llm_engine, Tally()
        waiting = {str(next(self._numbers)): one for one in running}
        done: dict[int, Completion] = {}
        steps = 0
        try:
            for name, row, request in zip(waiting, rows, requests, strict=True):
                engine.add_request(name, {"prompt_token_ids": list(row.prompt_tokens)}, request)
            while waiting:
                steps += 1
                for output in engine.step():
                    # One that was just cut short may come once more.
                    if one := waiting.get(output.request_id):
                        completion = _take(one, rows[one.position], output, rule)
                        if completion:
                            done[one.position] = completion
                            del waiting[output.request_id]
                            engine.abort_request([] if output.finished else [output.request_id])
        finally:
            engine.abort_request(list(waiting))
        if steps:
            tally.add("rollout/rows_per_step", sum(len(completion.tokens) for completion in done.values()), steps)
        return [done[position] for position in range(len(rows))], tally

    def _check_awake(self) -> None:
        if self._asleep:
            raise UserError("the vLLM engine sleeps", where="rollout", fix="call wake first")

    def _check_bucket(self, bucket: Mapping[str, Tensor], arrived: set[str]) -> None:
        for name, weight in bucket.items():
            if name not in self._shapes:
                raise _mismatch(f"has no weight called {name}")
            if self._shapes[name] != tuple(weight.shape):
                raise _mismatch(f"holds {name} as {list(self._shapes[name])}, what came is {list(weight.shape)}")
            if name in arrived:
                raise _mismatch(f"was sent {name} twice in one update")

    def _on_workers(self, method: str, *arguments: Any) -> list[Any]:
        return cast("list[Any]", self._llm.collective_rpc(method, args=arguments))


def request_seed(key: SamplingKey, prompt_id: int, sample_index: int) -> int:
    """The seed of one completion, 63 bits: a stable hash of everything that names it (law 9)."""
    name = f"{key.seed}/{key.stream}/{key.step}/{prompt_id}/{sample_index}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def _build(settings: VllmSettings) -> Any:
    # In this process: weights then reach the worker as tensors, and nothing outlives the actor.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        fix = "install rlhf-dist[vllm] into an environment of its own; without a GPU: bash launch/vllm_env.sh"
        raise UserError("vLLM is not installed here", where="rollout.engine", fix=fix) from error
    memory: dict[str, Any] = {"gpu_memory_utilization": settings.memory_share}
    if settings.kv_cache_gib is not None:
        # vLLM then sizes nothing by the share, but refuses to start unless that much of the GPU is free.
        memory = {"kv_cache_memory_bytes": int(settings.kv_cache_gib * GIB), "gpu_memory_utilization": LEAST_SHARE}
    try:
        return LLM(
            settings.model,
            skip_tokenizer_init=True,
            trust_remote_code=settings.trust_remote_code,
            dtype=DTYPES[settings.dtype],
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.slots,
            # A prompt cut into chunks would draw from its generator once a chunk, and when depends on the other rows (law 9).
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(settings.max_model_len, settings.slots, PREFILL_TOKENS),
            # A cached prefix would serve keys and values of older weights.
            enable_prefix_caching=False,
            # The defaults of the model's generation_config.json (top-k, temperature, stops) must not slip in.
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            enforce_eager=not torch.cuda.is_available(),
            enable_sleep_mode=settings.sleep,
            worker_extension_cls=f"{__name__}.{WeightReceiver.__name__}",
            **memory,
        )
    except ValueError as error:
        reason = str(error).partition(" [type=")[0]  # pydantic adds the values of all fields
        raise UserError(f"vLLM refuses this engine: {reason}", where=settings.model, fix="change what it names") from error


def _request(row: RolloutRow, limit: int, params: SamplingParams, key: SamplingKey) -> Any:
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    return VllmParams(
        max_tokens=limit,
        temperature=params.temperature,
        seed=request_seed(key, row.prompt_id, row.sample_index),
        stop_token_ids=list(params.stop_tokens),
        ignore_eos=True,  # the configured stop tokens alone count
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if params.stop_strings else RequestOutputKind.FINAL_ONLY,
    )


def _take(running: RunningRow, row: RolloutRow, output: Any, rule: StopRule) -> Completion | None:
    """Appends what came; the completion if the row has ended."""
    piece = output.outputs[0]
    for token, start in zip(piece.token_ids, piece.logprobs.start_indices, strict=True):
        logprob = piece.logprobs.logprobs[start]
        if not -float("inf") < logprob <= 0:
            raise diverged(row, len(running.tokens))
        running.tokens.append(token)
        running.logprobs.append(logprob)
        reason = rule.reason(running.tokens, running.limit)
        if reason is not None:
            return Completion(tuple(running.tokens), tuple(running.logprobs), reason)
    if output.finished:
        raise RuntimeError(f"vLLM ended prompt id {row.prompt_id} after {len(running.tokens)} tokens: {piece.finish_reason}")
    return None


def _check_params(params: SamplingParams) -> None:
    if params.filtered:
        # Its log-probs are either of the filtered distribution, or of the unfiltered one at temperature 1.
        what = "vLLM does not report the log-probs of the unfiltered distribution beside top-k and top-p"
        raise UserError(what, where="rollout.top_k, rollout.top_p", fix="set top_k to 0 and top_p to 1, or use the native engine")
    coldest, hottest = VLLM_TEMPERATURES
    if not coldest <= params.temperature <= hottest:
        fix = f"set it between {coldest} and {hottest}, or use the native engine"
        raise UserError(f"vLLM does not sample at temperature {params.temperature}", where="rollout.temperature", fix=fix)


def _mismatch(what: str) -> UserError:
    fix = "trainer and sampler must load the same architecture, and an update must hold each weight once"
    return UserError(f"the sampler's model {what}", where=SYNC, fix=fix)


def _require(holds: bool, what: str, fix: str) -> None:
    if not holds:
        raise UserError(what, where="rollout", fix=fix)
