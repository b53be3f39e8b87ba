"""DeepSpeed ZeRO: optimiser state (stage 1), gradients (2) and weights (3) in shards.

Weights are fp32 on every stage and autocast lowers the operands of products: DeepSpeed's own bf16 mode would compute
with weights of 8 significant bits, in which w - a (a: the prior's anchor) is noise.

A stage-3 network is used in training only, since DeepSpeed expects every pass to be a training pass. For other passes,
its weights are copied into a second, sharded network (engine.sharded) when they have changed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from hpccl.config.engine import DeepspeedEngine as DeepspeedConfig
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.spread import Leaves, Slab, Span, Stored, elements, streamed
from hpccl.engine.base import BaseEngine
from hpccl.engine.deepspeed_start import initialize
from hpccl.engine.moments import device_of, group_numbers, load_state, state_of
from hpccl.engine.optim import build_optimizer
from hpccl.engine.protocols import Weights, trainable
from hpccl.engine.sharded import Mesh, load_spread, skeleton, spans_of, spread_copy, whole_copy
from hpccl.optim.noise import Run

__all__ = ["DeepspeedEngine"]


@final
class DeepspeedEngine(BaseEngine):
    """The Engine protocol on a DeepSpeed engine."""

    def __init__(self, model: nn.Module, config: RunConfig, comm: Comm) -> None:
        super().__init__(model, config, comm)
        assert isinstance(config.engine, DeepspeedConfig)
        self._stage, self._offloaded = config.engine.stage, config.engine.offload_optimizer
        comm.broadcast_(list(model.state_dict().values()))
        self._bare = skeleton(model)
        self._parameters = dict(model.named_parameters())
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        self._shapes = {name: tuple(value.shape) for name, value in self._parameters.items()}
        optimizer = build_optimizer(self._optim, model)
        self._engine = initialize(model, optimizer, config, comm)
        self._inner: torch.optim.Optimizer = optimizer
        self._fresh = group_numbers(optimizer.param_groups)
        self._zero: Any = self._engine.optimizer if self._stage else None
        for name, parameter in trainable(model).items():
            parameter.register_hook(self._relay(name))
        self._weight_spans = (
            {name: _flat_span(p, comm) for name, p in self._parameters.items()} if self._stage == 3 else {}
        )
        self._twin: nn.Module | None = None
        self._twin_spans: dict[str, Span] = {}
        self._stale = True
        self._trying = False
        self._keep_initial()

    # ---------------------------------------------------------------- where things are

    @property
    def _spans(self) -> Mapping[str, Span]:
        return self._weight_spans

    def _locals(self) -> dict[str, Tensor]:
        if self._stage < 3:
            return {name: value.detach() for name, value in self._parameters.items()}
        return {name: self._master(name) for name in self._parameters}

    def _master(self, name: str) -> Tensor:
        """Stage 3: this rank's elements as the optimiser holds them, or trial weights if shown, without padding."""
        parameter: Any = self._parameters[name]
        count = self._weight_spans[name].numel
        if not parameter.requires_grad:
            frozen: Tensor = parameter.ds_tensor.data[:count]
            return frozen
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        if self._trying:
            shown: Tensor = parameter.ds_tensor.data[:count]
            return shown
        part: Tensor = self._zero.fp32_partitioned_groups_flat[group].data.narrow(0, offset, count)
        return part

    @property
    def like(self) -> dict[str, Tensor]:
        """See BaseEngine."""
        source = dict(self._bare.named_parameters()) if self._stage == 3 else self._parameters
        return {name: value.detach() for name, value in source.items() if value.requires_grad}

    def _whole_now(self, name: str) -> Tensor:
        far = self._hooks.far.get(name)
        return self._parameters[name].detach() if far is None else far

    @torch.no_grad()
    def _put_locals(self, values: Weights) -> None:
        super()._put_locals(values)
        self._stale = True
        for name in values:
            parameter: Any = self._parameters[name]
            if self._stage == 3:
                own = self._master(name)
                parameter.ds_tensor.data[: len(own)].copy_(own)
            elif self._stage and getattr(parameter, "_hp_mapping", None) is not None:
                span, fragment = _fragment(parameter)
                fragment.copy_(elements(parameter, span.start, span.stop))
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        """Stage 3: gather again the parameters that DeepSpeed keeps whole between passes."""
        if self._stage == 3 and self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    # ---------------------------------------------------------------- training

    def _restart(self) -> None:
        self._optimizer = self._inner
        self._inner.state.clear()
        for group, numbers in zip(self._inner.param_groups, self._fresh, strict=True):
            for key in group_numbers([group])[0].keys() - numbers.keys():  # Adan adds a step count at its first step
                del group[key]
            group.update(numbers)

    def _run(self, pixels: Tensor) -> Tensor:
        self._fetch_far()
        self._engine.set_gradient_accumulation_boundary(self._last)
        logits: Tensor = self._engine(pixels)
        return logits

    def _pull_back(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def _update(self, rate: float) -> Tensor:
        for group in self._inner.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self._stale = True
        if self._stage == 0:
            return self._update_whole()
        self._engine.step()  # which skips the update if the norm is not finite
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device="cpu")

    def _update_whole(self) -> Tensor:
        parameters = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        known = norm.cpu()  # the step's only synchronisation: before the optimiser runs, so that nothing waits for it
        if bool(torch.isfinite(known)):
            if self._train.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._train.clip_norm, norm)
            self._engine.step()
        self._engine.zero_grad()
        return known

    # ---------------------------------------------------------------- the path integral (SI)

    def _gradients(self) -> dict[str, Tensor]:
        """See BaseEngine; between the last backward pass and the step, DeepSpeed holds averaged gradients in shards."""
        if self._stage == 0:
            return super()._gradients()
        self._wait_for_gradients()
        return {name: self._shard_of_gradient(name) for name in self.like}

    def _shard_of_gradient(self, name: str) -> Tensor:
        """DeepSpeed's averaged gradient of the elements that this rank updates; shares memory."""
        parameter: Any = self._parameters[name]
        if self._stage == 3:
            part: Tensor = self._zero.get_local_fp32_grad_for_param(parameter)
            return part[: self._weight_spans[name].numel]
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return torch.zeros(0, device=self.device)
        fragment: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # in its shape, if whole
        return fragment.view(-1)

    def _graded(self, name: str, value: Tensor) -> Tensor:
        """See BaseEngine: on stages 1 and 2 weights are whole and gradients are not."""
        if self._stage not in (1, 2):
            return value
        parameter: Any = self._parameters[name]
        here = getattr(parameter, "_hp_mapping", None) is not None
        span = _fragment(parameter)[0] if here else Span(self._shapes[name], 0, 0)
        return value.view(-1)[span.start : span.stop]

    def _credited(self) -> dict[str, Tensor]:
        """See BaseEngine."""
        credit = super()._credited()
        if self._stage in (1, 2):
            self._comm.sum_([credit[name] for name in sorted(credit)])
        return credit

    # ---------------------------------------------------------------- trial weights

    def _runs(self) -> dict[Tensor, list[Run]]:
        if self._stage == 0:
            return {value: [Run(name, 0, value.numel())] for name, value in trainable(self._model).items()}
        return {
            flat: [Run(name, span.start, span.numel, first) for name, (span, first) in places.items()]
            for flat, places in self._buckets()
        }

    def _show_gradients(self) -> None:
        if self._stage == 0:
            return
        self._wait_for_gradients()
        if self._offloaded:  # DeepSpeed keeps them there itself
            return
        for flat, places in self._buckets():
            flat.grad = torch.zeros_like(flat)
            for name, (span, first) in places.items():
                flat.grad.narrow(0, first, span.numel).copy_(self._shard_of_gradient(name))

    def _wait_for_gradients(self) -> None:
        """Wait for copies to host memory (offloading, stages 1 and 2): DeepSpeed itself waits only in its step."""
        if self._offloaded and self._stage in (1, 2) and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _take_gradients(self) -> None:
        if self._stage == 0:
            return
        for flat, places in self._buckets():
            assert flat.grad is not None, "_show_gradients comes first"
            if self._perturbing is not None and self._perturbing.rewrites:
                self._take_gradient(flat.grad, places)
            if not self._offloaded:
                flat.grad = None

    def _take_gradient(self, gradient: Tensor, places: Mapping[str, tuple[Span, int]]) -> None:
        for name, (span, first) in places.items():
            own = gradient.narrow(0, first, span.numel)
            if not self._offloaded:
                self._shard_of_gradient(name).copy_(own)
            elif span.numel:  # DeepSpeed clips by these norms
                self._zero.norm_for_param_grads[self._zero.get_param_id(self._parameters[name])] = own.norm()

    def _clear_gradients(self) -> None:
        """As DeepSpeed does when it skips a step: the next pass's gradients replace this one's."""
        self._engine.zero_grad()
        if self._stage == 0:
            return
        self._zero.zero_grad()
        if self._stage == 3:
            return
        self._zero.micro_step_id = -1
        if self._offloaded:
            self._zero.reset_cpu_buffers()
        for kept in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        if self._stage == 0:
            return torch.nn.utils.get_total_norm(gradients)
        return self._norm_of_parts(gradients)

    @contextlib.contextmanager
    def _shown(self, tensors: list[Tensor], trial: list[Tensor] | None) -> Iterator[None]:
        """See BaseEngine. On stages 1 to 3, passes compute with other tensors than the optimiser's."""
        if self._stage == 0 or trial is None:
            with super()._shown(tensors, trial):
                yield
            return
        pieces = {
            name: Slab(values.narrow(0, first, span.numel), span)
            for values, (_, places) in zip(trial, self._buckets(), strict=True)
            for name, (span, first) in places.items()
        }
        trial.clear()
        with self._computing_with(pieces) if self._stage == 3 else self._copied_over(pieces):
            yield

    @contextlib.contextmanager
    def _copied_over(self, pieces: Mapping[str, Slab]) -> Iterator[None]:
        """Stages 1 and 2: write the pieces of all ranks into the whole weights; restore them afterwards."""
        weights = {name: self._parameters[name].detach() for name in pieces}
        held = {name: value.clone() for name, value in weights.items()}
        for name, value in streamed(pieces, self._comm):
            weights[name].copy_(value)
        try:
            yield
        finally:
            for name, value in held.items():
                weights[name].copy_(value)

    @contextlib.contextmanager
    def _computing_with(self, pieces: Mapping[str, Slab]) -> Iterator[None]:
        """Stage 3: write this rank's pieces into DeepSpeed's shards; the optimiser's fp32 weights stay as they are."""
        for name, piece in pieces.items():
            self._parameters[name].ds_tensor.data[: piece.span.numel].copy_(piece.local)  # type: ignore[attr-defined]  # ZeRO's own
        self._trying = True
        self._gather_persistent()
        try:
            yield
        finally:
            self._trying = False
            for name in pieces:
                own = self._master(name)
                self._parameters[name].ds_tensor.data[: len(own)].copy_(own)  # type: ignore[attr-defined]  # ZeRO's own
            self._gather_persistent()

    # ---------------------------------------------------------------- passes outside training

    @property
    def module(self) -> nn.Module:
        """See the protocol; on stage 3, access is collective if the weights have changed since the last time."""
        if self._stage < 3:
            return self._model
        if self._twin is None:
            mesh = Mesh.of(self._comm, None)
            self._twin = spread_copy(self._bare, mesh, self.device)
            self._twin_spans = spans_of(self._bare, mesh)
        if self._stale:
            load_spread(self._twin, self._twin_spans, streamed(self.gather(), self._comm))
            self._stale = False
        return self._twin

    def whole_module(self) -> nn.Module:
        """See the protocol."""
        return self._model if self._stage < 3 else whole_copy(self._bare, self.gather(), self._comm)

    def frozen(self, weights: Leaves) -> Callable[[Tensor], Tensor]:
        """See the protocol; the copy is sharded on stage 3."""
        if self._stage < 3:
            copied = whole_copy(self._bare, weights, self._comm).requires_grad_(False)
        else:
            mesh = Mesh.of(self._comm, None)
            copied = spread_copy(self._bare, mesh, self.device).requires_grad_(False)
            load_spread(copied, spans_of(self._bare, mesh), streamed(weights, self._comm))
        return functools.partial(self._infer, copied)

    # ---------------------------------------------------------------- optimiser state

    def _buckets(self) -> Iterator[tuple[Tensor, dict[str, tuple[Span, int]]]]:
        """Yield the optimiser's flat tensors [n], each with its parts by parameter: (elements, offset in it)."""
        if self._stage == 3:
            for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                yield (
                    flat,
                    {
                        self._names[p]: (
                            self._weight_spans[self._names[p]],
                            self._zero.grad_position[self._zero.get_param_id(p)][1],
                        )
                        for p in self._zero.fp16_groups[number]
                    },
                )
            return
        for number, flat in enumerate(self._zero.single_partition_of_fp32_groups):
            found = {}
            for parameter in self._zero.bit16_groups[number]:
                name = self._names[parameter]
                if getattr(parameter, "_hp_mapping", None) is None:
                    found[name] = (Span(self._shapes[name], 0, 0), 0)
                else:
                    found[name] = (_fragment(parameter)[0], parameter._hp_mapping.hp_fragment_address.start)
            yield flat, found

    def _optimizer_state(self) -> dict[str, Any] | None:
        if self._optimizer is None:
            return None
        if self._stage == 0:
            return state_of(self._inner, self._names, {})
        moments: dict[str, dict[str, Any]] = {}
        for flat, places in self._buckets():
            for key, value in self._inner.state.get(flat, {}).items():
                for name, (span, first) in places.items():
                    spread = isinstance(value, Tensor) and value.shape == flat.shape
                    kept = Slab(value.narrow(0, first, span.numel), span) if spread else _own(value)
                    moments.setdefault(name, {})[key] = kept
        return {"moments": moments, "groups": group_numbers(self._inner.param_groups)}

    def _load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        if self._stage == 0:
            load_state(self._inner, self._names, {}, state)
            return
        for group, numbers in zip(self._inner.param_groups, state["groups"], strict=True):
            group.update(numbers)
        moments = state["moments"]
        settings = self._inner.param_groups[0]
        for flat, places in self._buckets():
            keys = dict.fromkeys(key for name in places for key in moments.get(name, {}))
            if keys:
                self._inner.state[flat] = {
                    key: _filled(flat, places, moments, key, device_of(key, settings, flat)) for key in keys
                }


def _filled(
    flat: Tensor,
    places: Mapping[str, tuple[Span, int]],
    moments: Mapping[str, Mapping[str, Any]],
    key: str,
    device: torch.device,
) -> Any:
    """Assemble one entry of the optimiser's state of `flat` from its parameters'; device: that of a number.

    Other engines save no state of parameters that had no gradient; here it is 0.
    """
    made: Tensor | None = None
    for name, (span, first) in places.items():
        value = moments.get(name, {}).get(key)
        if value is None:
            continue
        if not isinstance(value, (Tensor, Slab, Stored)) or tuple(value.shape) != span.shape:
            return value.to(device, copy=True) if isinstance(value, Tensor) else value
        part = elements(value, span.start, span.stop)
        if made is None:
            made = torch.zeros(flat.shape, dtype=part.dtype, device=flat.device)
        made.narrow(0, first, span.numel).copy_(part)
    return made


def _own(value: Any) -> Any:
    """Copy a number: in checkpoints every parameter has its own, though the optimiser has one per flat tensor."""
    return value.clone() if isinstance(value, Tensor) else value


def _fragment(parameter: Any) -> tuple[Span, Tensor]:
    """Stages 1 and 2: the span of a parameter that this rank updates, and its part of the optimiser's flat tensor."""
    mapping = parameter._hp_mapping
    start = mapping.lp_fragment_address.start
    fragment: Tensor = mapping.hp_fragment.data
    return Span(tuple(parameter.shape), start, start + mapping.lp_fragment_address.numel), fragment


def _flat_span(parameter: Any, comm: Comm) -> Span:
    """Stage 3: this rank's span of a parameter, which is cut into equal parts, the last ones padded."""
    size, count = parameter.partition_numel(), parameter.ds_numel
    return Span(tuple(parameter.ds_shape), min(comm.rank * size, count), min((comm.rank + 1) * size, count))
