"""Per-example gradients of the tracked layers at any checkpoint, one batch at a time."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint import Loaded, differing_names
from ..choices import Precision
from ..digests import skeleton
from ..errors import CheckpointError, TaskError, user_code
from ..examples import Examples, Role
from ..factors import Formed, Layer
from ..memory import in_halves
from ..task import PREDICTED, Task
from ..tree import map_tensors, tensors
from ..unwrapping import uncompiled
from ..weights import Base, negligible
from .answers import PREDICTIONS, Answers
from .functional import COLLATE, LOSS, QUERY_LOSS, LossModule, loop_gradients, vmap_gradients
from .geometry import geometry_of
from .hooks import Consume, Hooks
from .layers import packed_parameters, plan_layers, refuse_what_hides, same_packed
from .narrow import NARROW, Narrow
from .precision import HALF, LOSS_SCALES, check_precision, full_float32, usable
from .states import State, States
from .tracked import Tracked, choose

T = TypeVar("T")

_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


class Engine:
    """Computes factors of the per-example gradients of a task, times the scales of its geometry: sqrt(eta) for TracIn.

    Use as a context: hooks and eval mode last until it ends, whatever happens inside, and other threads
    with an engine of the same model wait. The model's own weights are never written: each pass runs with a
    checkpoint's tensors in their place. What else is done to gradients before they are compared, whoever consumes them
    has ``geometry`` do.

    Args:
        task: what is differentiated.
        precision: ``"float32"``; ``"bfloat16"``, by autocast, faster where the processor has it;
            ``"float16"``, by autocast on CUDA alone, with the losses scaled so that gradients do
            not underflow; or ``"float64"`` for reference runs.
        device: where to compute, by default where the model is; the model itself is not moved.
        channels_last: whether pictures and the weights of convolutions are laid out with the
            channels last in memory, which is faster and changes no result but rounding; by
            default where there are two-dimensional convolutions and the model runs with it.
        tracked: which parameters, with which weights, by default as the task says.
        alone: whether each example is a batch of its own, for losses that mix the examples of a batch (padding
            without a mask); whoever calls :meth:`run` then gives it one at a time, as :meth:`in_halves` does.
        one_at_a_time: whether the weights of one checkpoint are held at a time; ``None`` if all do not fit.

    Raises:
        ArgumentError: the precision or device is unknown or cannot be used here.
        TaskError: a layer pattern matches nothing, nothing was trained, or a module cannot be seen through.
        CheckpointError: a checkpoint does not load or has no weight.
    """

    def __init__(
        self,
        task: Task,
        precision: Precision = "float32",
        device: str | torch.device | None = None,
        channels_last: bool | None = None,
        tracked: Tracked | None = None,
        alone: bool = False,
        one_at_a_time: bool | None = None,
    ) -> None:
        self.task, self.alone = task, alone
        self.batch_tokens: int | None = None  # the most of a pass, padding counted
        self.precision = precision
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.model = task.model
        first = next(self.model.parameters(), None)
        if first is None:
            raise TaskError("The model has no parameters, so there are no gradients to trace.")
        self.device = usable(first.device if device is None else device)
        check_precision(precision, self.device)
        self.layout_is_free = channels_last is None
        if channels_last is None:
            channels_last = any(isinstance(module, nn.Conv2d) for module in self.model.modules())
        self.channels_last = channels_last
        self.tracked = choose(task) if tracked is None else tracked
        self.parameters, self.learning_rates = self.tracked.parameters, self.tracked.learning_rates
        refuse_what_hides(self.model, self.parameters)
        self.layers = plan_layers(self.model, self.parameters)
        self._frozen = {name for name, _ in self.model.named_parameters()} - set(self.parameters)
        # A tensor shared under several names is given once, so that all of its uses follow it.
        unique = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        # Buffers that checkpoints leave out go to the device as well; copies, which the model may write to.
        saved = self.model.state_dict()
        unsaved = {name: tensor.clone() for name, tensor in self.model.named_buffers() if name not in saved}

        packed = packed_parameters(self.model, self._frozen)
        self._base = base = Base(self.model, self.parameters)
        moments = task.preconditioner is not None

        def state_of(loaded: Loaded) -> dict[str, Tensor]:
            tensors = unsaved | loaded.tensors
            for name, parameter in packed.items():
                if not same_packed(tensors.pop(name), parameter.detach()):
                    raise CheckpointError(
                        f"{loaded.checkpoint.path} has another {name} than the model, which is quantised and stays as "
                        "it is. Load the model that was trained."
                    )
            return {f"model.{name}": self._weight(name, tensor) for name, tensor in tensors.items() if name in unique}

        def read_again(number: int) -> dict[str, Tensor]:
            loaded = task.checkpoints[number].read(self.model, base)
            if loaded.sha256 != self.loaded[number].sha256:
                raise CheckpointError(
                    f"{loaded.checkpoint.path} was changed while it was in use. Try again once it is fully written."
                )
            return state_of(loaded)

        # Each file is read once, unless its weights are let go of: weights, rates, moments and digest are of the same
        # bytes.
        self.states = States(len(task.checkpoints), read_again, self.device, one_at_a_time)
        self.loaded: list[Loaded] = []
        self.geometry = geometry_of(task.preconditioner)
        tracked_tensors = {name: self.model.get_parameter(name) for name in self.parameters}
        for number, (checkpoint, rates) in enumerate(zip(task.checkpoints, self.learning_rates, strict=True)):
            loaded = checkpoint.read(self.model, base, moments)
            loaded.check_rates(rates)
            self.geometry.read(loaded, tracked_tensors, rates)
            self.loaded.append(loaded.without_numbers())
            self.states.keep(number, state_of(loaded))
            del loaded  # its tensors are as large as the model
        self.notes = differing_names(self.loaded)
        self.notes += negligible([checkpoint.path for checkpoint in task.checkpoints], self.learning_rates)
        # By checkpoint and parameter, what gradients are multiplied by.
        self.scales = [self.geometry.scales(rates) for rates in self.learning_rates]
        self._answers = Answers(task, self._answer)
        self._training: list[tuple[nn.Module, bool]] = []
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        self._stack = contextlib.ExitStack()
        self._entered = False
        self.hooks = Hooks(self.model, self.layers, self.dtype)

    @property
    def n_checkpoints(self) -> int:
        """The number of checkpoints."""
        return len(self.states)

    @property
    def loss_scales(self) -> tuple[float, ...]:
        """What :meth:`run` may multiply the losses by; where gradients overflow with one, try the next."""
        return LOSS_SCALES if self.precision == "float16" else (1.0,)

    @property
    def at(self) -> str:
        """What is, or was last, being computed: to tell a person where it failed."""
        return self.hooks.at

    def __enter__(self) -> Engine:
        with _LOCKS_LOCK:
            lock = _LOCKS.setdefault(self.model, threading.RLock())
        lock.acquire()  # while hooks are on a model and other tensors in it, no other thread may use it
        self._lock = lock
        try:
            self._base.check()
        except CheckpointError:
            lock.release()
            raise
        self._training = [(module, module.training) for module in self.model.modules()]
        self._attributes = [(module, dict(vars(module))) for module in self.model.modules()]
        for module in self.model.modules():  # what a train() or eval() of the model's own does besides is left out
            module.training = False
        self._stack.enter_context(full_float32())
        self._stack.enter_context(uncompiled(self.model))
        if self.device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in self.model.modules()):
            # cuDNN refuses the backward pass of a recurrent layer in eval mode; torch's own kernels do not.
            self._stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        self._entered = True
        self.hooks.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hooks.remove()
        self._entered = False
        self._stack.close()
        for module, training in self._training:
            module.training = training
        self._take_back_tensors()
        self._lock.release()

    def _take_back_tensors(self) -> None:
        """Give modules their plain tensors back, such as caches and the weight that old weight norm computes."""
        for module, attributes in self._attributes:
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value is not attributes.get(name):
                    if name in attributes:
                        vars(module)[name] = attributes[name]
                    else:
                        del vars(module)[name]
        self._attributes = []

    def replan(self, layers: Sequence[Layer], shares: bool) -> None:
        """Take other routes from now on; ``shares`` as in :class:`Hooks`."""
        stay = {layer.name for layer in set(self.layers) & set(layers)}
        self.layers = list(layers)
        self.hooks.remove()
        harmless = {use for use in self.hooks.harmless if use[0] in stay}  # those that disagreed have left their routes
        self.hooks = Hooks(self.model, self.layers, self.dtype)
        self.hooks.shares, self.hooks.harmless = shares, harmless
        if self._entered:
            self.hooks.install()

    def in_halves(self, action: Callable[[Examples], list[T]], examples: Examples) -> list[T]:
        """``action(examples)``, or the results of both halves where memory runs out; each alone if the engine says so.

        Raises:
            OutOfMemoryError: one example alone does not fit; says where, and how much was asked for.
        """
        return in_halves(action, examples, lambda: self.at, self.alone)

    def run(
        self,
        checkpoint: int,
        examples: Examples,
        consume: Consume,
        *,
        loss_scale: float | None = None,
        general: bool = True,
    ) -> Tensor:
        """Run some examples, as one batch, through one checkpoint.

        Args:
            checkpoint: its position.
            examples: which, and with which loss.
            consume: called as ``consume(layer number, factors)``, for a hooked layer while the
                backward pass runs, so that nothing is kept longer than needed. Layers that the
                loss does not depend on have zero gradients and are not reported.
            loss_scale: one of :attr:`loss_scales`, by default the first.
            general: whether layers without hooks are computed as well.

        Returns:
            (n,) the losses.

        Raises:
            LossError: the loss is not one number per example.
        """
        wrapper, scales = self.wrapper(examples.role), self.scales[checkpoint]
        loss_scale = loss_scale or self.loss_scales[0]
        losses = self.run_hooked(checkpoint, examples, consume, wrapper, scales, loss_scale)
        if general:
            self.run_general(checkpoint, examples, consume, wrapper, scales, loss_scale)
        return losses

    def run_hooked(
        self,
        checkpoint: int,
        examples: Examples,
        consume: Consume,
        wrapper: LossModule,
        scales: Mapping[str, float],
        loss_scale: float = 1.0,
        lenient: bool = False,
    ) -> Tensor:
        """The hooked layers alone, times ``scales`` by parameter; ``lenient`` leaves out a layer whose rule fails."""
        state, batch = self.states[checkpoint], self.batch(examples)

        def through(then: Callable[[Tensor], Tensor]) -> Tensor:
            return wrapper.through(state, batch, len(examples), then)

        return self.hooks.run(through, state, scales, len(examples), consume, loss_scale, lenient, wrapper.autocast)

    def run_general(
        self,
        checkpoint: int,
        examples: Examples,
        consume: Consume,
        wrapper: LossModule,
        scales: Mapping[str, float],
        loss_scale: float = 1.0,
    ) -> None:
        """The other layers alone, in the same way."""
        state = self.states[checkpoint]
        for route in ("vmap", "loop"):
            chosen = {number: layer for number, layer in enumerate(self.layers) if layer.route == route}
            if not chosen:
                continue
            names = [layer.parameters[0] for layer in chosen.values()]
            self.hooks.at = f"the gradients of {', '.join(names)} ({route})"
            batch = self.sliceable(examples) if route == "vmap" else None
            if batch is not None:
                gradients = vmap_gradients(wrapper, state, names, batch, len(examples), loss_scale)
            else:
                gradients = loop_gradients(wrapper, state, names, self.singles(examples), loss_scale)
            for (number, layer), gradient in zip(chosen.items(), gradients, strict=True):
                scaled = gradient.to(self.dtype).reshape(len(examples), 1, -1) * scales[layer.parameters[0]]
                consume(number, Formed(scaled))

    def lay_out(self, channels_last: bool) -> None:
        """Have the weights and pictures of convolutions in this layout from now on."""
        self.channels_last = channels_last
        self.states.recast(self._recast)

    def losses(self, checkpoint: int, examples: Examples) -> Tensor:
        """(n,) the losses of examples at a checkpoint, by forward passes alone, never in half precision."""
        wrapper = self.wrapper(examples.role, exact=True)

        def forward(examples: Examples) -> list[Tensor]:
            with torch.no_grad():
                return [wrapper.losses(self.states[checkpoint], self.batch(examples), len(examples))]

        return torch.cat(self.in_halves(forward, examples))

    @contextlib.contextmanager
    def doubled(self, checkpoint: int) -> Iterator[None]:
        """Compute at a checkpoint in float64 for the time of the block: what is left of a difference is no rounding."""
        before = self.precision, self.dtype
        self.precision, self.dtype = "float64", torch.float64
        try:
            with self.states.replaced(checkpoint, self._recast):
                self.hooks.dtype = self.dtype
                yield
        finally:
            self.precision, self.dtype = before
            self.hooks.dtype = self.dtype

    def wrapper(self, role: Role, exact: bool = False) -> LossModule:
        """The loss as a function of weights, in the engine's precision, or if ``exact`` never in half of it."""
        name = QUERY_LOSS if role == "query" and callable(self.task.query_loss) else LOSS
        return LossModule(self.model, self.task.loss_for(role), None if exact else HALF.get(self.precision), name)

    def singles(self, examples: Examples) -> list[Any]:
        """Each example as a batch of its own."""
        return [self.batch(example) for example in examples]

    def batch(self, examples: Examples) -> Any:
        """Examples collated and cast, a fresh batch that the loss may take apart and change in place.

        Queries have the final model's answers as labels where the task says so.
        """
        batch = self._collated(examples)
        answered = examples.role == "query" and self.task.query_loss == PREDICTED
        return self._answers.relabelled(examples, batch) if answered else batch

    def _answer(self, example: Examples) -> list[Tensor]:
        """What a loss that has ``predictions`` gives at the last checkpoint."""
        wrapper = LossModule(self.model, self.task.loss.predictions, None, PREDICTIONS)  # type: ignore[attr-defined]
        with torch.no_grad():
            return wrapper.within(self.states[-1], self._collated(example), list)

    def _collated(self, examples: Examples) -> Any:
        with user_code(COLLATE):
            collated = self.task.collate(examples.items)

        def owned(tensor: Tensor) -> Tensor:
            cast = self._cast(tensor)
            return cast.clone() if cast is tensor else cast  # what collate hands on may be the data set's own

        return map_tensors(collated, owned, self.device, self.task.data_sets)

    def sliceable(self, examples: Examples) -> Any | None:
        """The examples as a batch whose tensors can be cut along their first axes into batches of one, or ``None``.

        A batch of one must have tensors with a first axis of 1 in the same places, and be the same in all else: counts
        or lists of lengths would stay those of the whole batch.
        """
        batch, single = self.batch(examples), self.batch(examples[:1])
        for leaves, n in ((tensors(batch), len(examples)), (tensors(single), 1)):
            if any(t.ndim == 0 or t.layout != torch.strided or t.is_nested or len(t) != n for t in leaves):
                return None
        return batch if skeleton(batch) == skeleton(single) else None

    def cast(self, tree: Any) -> Any:
        """Every tensor on the device, and in the engine's floating-point type and layout."""
        return map_tensors(tree, self._cast, self.device, self.task.data_sets)

    def _weight(self, name: str, tensor: Tensor) -> Tensor:
        """A weight for its use; untracked matrices in half precision stay so, and are cast where they are used."""
        if tensor.dtype in NARROW and tensor.ndim in (2, 3) and name in self._frozen:
            return Narrow.of(tensor.to(self.device), self.dtype)
        weight: Tensor = self.cast(tensor)
        return weight

    def _recast(self, state: State) -> State:
        return {
            name: tensor.widened(self.dtype) if isinstance(tensor, Narrow) else self.cast(tensor)
            for name, tensor in state.items()
        }

    def _cast(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else self.dtype.to_complex() if tensor.is_complex() else None
        cast = tensor if dtype is None else tensor.to(dtype)
        laid_out = cast.layout == torch.strided and not cast.is_nested and cast.ndim in (4, 5)
        if not (laid_out and cast.is_floating_point()):
            return cast
        last = torch.channels_last if cast.ndim == 4 else torch.channels_last_3d
        return cast.contiguous(memory_format=last if self.channels_last else torch.contiguous_format)
