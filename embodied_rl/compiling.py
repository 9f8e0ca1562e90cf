"""Turns a step of the learner into one compiled function, where a compiler is at hand."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx

from embodied_rl import products
from embodied_rl.nests import mapped, tensors_of

Result = TypeVar("Result")


class Compiled(Generic[Result]):
    """Calls a function through `torch.compile`, or, where that fails, as it is written.

    The graph holds everything: losses, gradients, optimiser step. Compiling takes some ten seconds
    a step on a CPU; torch keeps the result on disk (TORCHINDUCTOR_CACHE_DIR) for the next run with
    the same sizes and versions, which then takes a few.

    Args:
        function: of tensors and dataclasses of them, always of the same settings, which changes
            parameters, statistics and moments where they are (tests/test_cuda_graphs.py). What
            else it sets, a module's mode say, is set in the first call alone. Given other sizes
            it runs as it is written.
        say: is told when it compiles, and why it could not.
    """

    def __init__(self, function: Callable[..., Result], say: Callable[[str], None]) -> None:
        self._plain, self._say = function, say
        self._call: Callable[..., Result] | None = None
        self._kinds: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._told = False  # that some arguments were of other kinds

    def __call__(self, *args: Any) -> Result:
        """Calls the function; the first time, compiles it."""
        tensors = tensors_of(args)
        if not all(t.is_contiguous() for t in tensors):
            args = mapped(args, Tensor.contiguous)
        kinds = [(t.shape, t.dtype, t.device) for t in tensors]
        if self._call is None:
            self._kinds = kinds
            return self._compile(args)
        if kinds == self._kinds or self._call is self._plain:
            return self._call(*args)
        if not self._told:
            self._told = True
            self._say(f"warning: {self._name} of other sizes than the first runs as it is, slower")
        return self._plain(*args)

    @property
    def _name(self) -> str:
        return self._plain.__name__.strip("_").replace("_", " ")

    def _compile(self, args: tuple[Any, ...]) -> Result:
        name = self._name
        self._say(f"compiling: {name} (train.compile; torch keeps it for the next run)")
        from torch._dynamo.exc import TorchDynamoException  # here: it takes seconds to import

        try:
            fast, result = self._fast(args)
        except (TorchDynamoException, AttributeError, ImportError) as error:  # or another torch
            reason = (str(error).strip().splitlines() or [""])[0]
            self._say(
                f"warning: {name} cannot be compiled here and runs as it is, about a third slower: "
                f"{type(error).__name__}: {reason} (train.compile=never: do not try)"
            )
        else:
            self._call = fast
            return result
        self._call = self._plain
        return self._plain(*args)

    def _fast(self, args: tuple[Any, ...]) -> tuple[Callable[..., Result], Result]:
        """Compiles, which happens in the first call; returns the function and its result."""
        from torch._dynamo import config
        from torch._functorch import config as autograd_config
        from torch._inductor import compile as inductor
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

        class Vectors(CustomGraphPass):
            """A pass with the name by which torch knows what it kept on disk."""

            def __call__(self, graph: fx.Graph) -> None:
                products.unfold_vectors(graph)

            def uuid(self) -> Any:
                return get_hash_for_files((products.__file__,))

        options = {
            # noise as torch itself draws it: the same numbers as without compiling
            "fallback_random": True,
            # asking for the size of every tensor takes 4 % of an update; `Compiled` asks for those
            # of the arguments, the others are the learner's own or what operations returned
            "size_asserts": False,
            "alignment_asserts": False,
            "compile_threads": 1,  # no processes of its own, which Ctrl-C would hit too
            # what has many operations is kept rather than computed again per element: the factors
            # of Batch Renormalisation, a number per feature, were made anew for every row
            "realize_opcount_threshold": 5,
            "post_grad_custom_post_pass": Vectors(),
        }
        programs: list[_Program] = []

        def backend(graph: fx.GraphModule, inputs: list[Any]) -> _Program:
            compiled: Any = inductor(graph, inputs, options)
            programs.append(_Program(compiled))
            return programs[-1]

        # asking at each call whether settings are still the same takes half a millisecond
        guards: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        fast = torch.compile(
            _own(self._plain), fullgraph=True, dynamic=False, backend=backend, options=guards
        )
        # the second: what is kept on disk includes the backward passes written out in a
        # `torch.autograd.Function`; without it most of the work is done in every run
        with (
            config.patch(trace_autograd_ops=True),
            autograd_config.patch(autograd_cache_allow_custom_autograd_functions=True),
        ):
            result = fast(*args)
        recorded = _recorded(programs[0], args, result) if len(programs) == 1 else None
        return recorded or fast, result


class _Program:
    """What the compiler made of a graph; remembers what it was first called with."""

    def __init__(self, compiled: Callable[..., Sequence[Tensor]]) -> None:
        self._compiled = compiled
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        outputs = self.run(inputs)
        if not self.inputs:
            self.inputs, self.outputs = list(inputs), list(outputs)
        return outputs

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with products.by_onednn():
            return self._compiled(*inputs)


def _recorded(
    program: _Program, args: tuple[Any, ...], result: Result
) -> Callable[..., Result] | None:
    """A way to the program with the learner's tensors, looked up once, and each call's arguments.

    torch's own way walks through modules and optimiser for 140 tensors at every call, and sets what
    the function set on them: 3 % of an update.

    Args:
        program: after its first call.
        args: of that call.
        result: of that call.

    Returns:
        None where some of what the program computes is not in the result, or the program reads an
        argument's memory through another tensor.
    """
    inputs, computed = program.inputs.copy(), {id(t): i for i, t in enumerate(program.outputs)}
    given = {id(tensor): i for i, tensor in enumerate(tensors_of(args))}
    varying = [(i, given[id(t)]) for i, t in enumerate(inputs) if id(t) in given]
    leaves = {id(t) for t in tensors_of(result)}
    if leaves != computed.keys() | (leaves & given.keys()):
        return None  # something is kept elsewhere, or was there before
    memory = {t.untyped_storage().data_ptr() for t in tensors_of(args)}
    fixed = [t for t in inputs if id(t) not in given]
    hidden = memory & {t.untyped_storage().data_ptr() for t in fixed} - {0}
    if hidden or len(given) < len(tensors_of(args)):
        return None
    for position, _ in varying:
        inputs[position] = inputs[position].new_empty(0)  # the first batch need not be kept
    program.inputs, program.outputs = [], []

    def call(*args: Any) -> Result:
        arguments, tensors = tensors_of(args), inputs.copy()
        for position, i in varying:
            tensors[position] = arguments[i]
        outputs = program.run(tensors)

        def present(tensor: Tensor) -> Tensor:
            i = computed.get(id(tensor))
            return arguments[given[id(tensor)]] if i is None else outputs[i]

        return mapped(result, present)

    return call


def _own(function: Callable[..., Result]) -> Callable[..., Result]:
    """A copy of a function or method with code of its own: torch keeps what it compiled there.

    Without guards, a second learner's method would otherwise run as the first one's.
    """
    if isinstance(function, types.MethodType):
        return types.MethodType(_own(function.__func__), function.__self__)
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
