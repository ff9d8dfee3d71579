"""Records the graphs of train.py's train_step and evaluate, without running them.

Both are called as in a real run, but with another torch_xla.sync. The real one compiles the pending
graph and starts it. Recorder.sync keeps the graph, and stores zeros where its results belong, so
that train.py can continue.

compile_for_tpu.py compiles the recorded graphs.
"""
import collections
import contextlib
import gc
import re
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch.overrides import TorchFunctionMode

import train

ROOT = Path(__file__).parent.parent
SOURCES = ROOT, ROOT / "nanoxla"  # directories of the code that operations are named after


@dataclass
class Graph:
    proto: bytes  # an HLO module
    line: str  # the line of train.py that calls torch_xla.sync
    donated: list  # for each input, whether a result may take its memory
    other_bytes: int  # size of the tensors on the device that the graph does not use
    runs: int = 0  # how often it runs in a step, or for a batch of an evaluation

    # known when the graph has been compiled
    hbm_bytes: int = 0  # in use while it runs
    by_kind: collections.Counter = None  # cycles of one run, by what they are spent on
    by_line: collections.Counter = None  # the same cycles, by source line


# --- naming operations by source line -----------------------------------------------------------


class SourceLines(TorchFunctionMode):
    """While active, names every operation in a graph after the source line that asked for it, as in
    "model.py:145". The operations of its backward pass get the same name."""

    def __init__(self):
        super().__init__()
        self.scopes = []  # open while an operation of a backward pass is recorded

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        frame = sys._getframe(1)
        while frame and Path(frame.f_code.co_filename).parent not in SOURCES:
            frame = frame.f_back
        line = location(frame) if frame else "elsewhere"
        scope = open_scope(line)
        result = function(*arguments, **(keywords or {}))
        del scope  # deleting it closes it
        if isinstance(result, torch.Tensor) and result.grad_fn:
            self.name_backward(result.grad_fn, line)
        return result

    def name_backward(self, node, line):
        """Names `node` of the backward pass, and all nodes after it that have no name yet: one
        operation can add several."""
        if node is None or "line" in node.metadata or node.name().endswith("AccumulateGrad"):
            return
        node.metadata["line"] = line  # a set of named nodes would keep their tensors alive
        node.register_prehook(lambda *_: self.scopes.append(open_scope(line)))
        node.register_hook(lambda *_: self.scopes.clear())
        for following, _ in node.next_functions:
            self.name_backward(following, line)


def open_scope(name):
    """Operations recorded from now on are named `name`, until the returned object is deleted."""
    return torch_xla._XLAC.profiler.scope_pusher(name)


def location(frame):
    """The line that a Python frame executes, as in "train.py:200"."""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


# --- recording ----------------------------------------------------------------------------------


class Recorder:
    """Its method `sync` stands in for torch_xla.sync.

    A graph may overwrite the buffer of an input if the tensor in that buffer gets a new value in
    this very graph: torch_xla *donates* the buffer. That decides how much memory the graph needs,
    and which sums XLA can compute in place. So the recorder tracks which tensor is in which buffer.
    """

    def __init__(self):
        self.graphs = {}  # {the graph as text: Graph}
        self.real_sync = torch_xla.sync
        self.note_buffers()

    def note_buffers(self):
        """Notes which tensors own which buffer. A buffer can have several owners, such as a
        parameter and its alias."""
        xm.wait_device_ops()  # a tensor has no buffer while it is being computed
        self.owners = collections.defaultdict(list)
        for tensor in live_tensors():
            # A placeholder of a traced function has no buffer.
            with contextlib.suppress(RuntimeError):
                buffer, = torch_xla._XLAC._get_tensors_handle([tensor])
                self.owners[buffer].append(weakref.ref(tensor))

    def sync(self):
        """Keeps the pending graph, and gives zeros to the tensors that it would compute."""
        tensors = live_tensors()
        needed = torch_xla._XLAC._check_tensor_need_materialization(tensors)
        pending = [tensor for tensor, need in zip(tensors, needed) if need]
        if not pending:
            return
        graph = self.describe(pending, location(sys._getframe(1)))
        # The name of a scope contains a counter, which differs between runs of the same graph.
        text = re.sub(r", metadata={[^}]*}", "", torch_xla._XLAC._get_xla_tensors_hlo(pending))
        recorded = self.graphs.setdefault(text, graph)
        recorded.runs += 1
        recorded.other_bytes = max(recorded.other_bytes, graph.other_bytes)
        with torch.no_grad():
            for tensor in pending:
                # Tensors, and not the number 0: that would be a constant of the next graph.
                tensor.copy_(torch.zeros(tensor.shape, dtype=tensor.dtype))
        self.real_sync()
        self.note_buffers()

    def describe(self, pending, line):
        """The Graph that computes the tensors in `pending`."""
        data_nodes = torch_xla._XLAC._get_tensors_xla_device_data_node(pending)[1]
        inputs = torch_xla._XLAC._get_tensors_handle(data_nodes)
        owners = {buffer: [tensor for ref in refs if (tensor := ref()) is not None]
                  for buffer, refs in self.owners.items()}
        overwritten = set(map(id, pending))
        free = {buffer for buffer, tensors in owners.items()
                if any(id(tensor) in overwritten for tensor in tensors)}
        used = free.union(inputs)
        other_bytes = sum(tensors[0].nbytes for buffer, tensors in owners.items()
                          if tensors and buffer not in used)
        proto = torch_xla._XLAC._get_xla_tensors_hlo_proto(pending)
        return Graph(proto, line, [buffer in free for buffer in inputs], other_bytes)


def live_tensors():
    """All tensors on the XLA device, oldest first: the order in which torch_xla.sync() lists them
    as results of a graph."""
    gc.collect()  # tracing leaves dead tensors in reference cycles
    found = {torch_xla._XLAC._xla_get_tensor_id(thing): thing for thing in gc.get_objects()
             if issubclass(type(thing), torch.Tensor) and thing.device.type == "xla"}
    return [found[number] for number in sorted(found)]


def record(config, cores):
    """The graphs of an optimiser step, and those that evaluate one batch: two lists of Graph."""
    gc.freeze()  # live_tensors then skips all objects that exist by now: there is no tensor yet
    device = torch_xla.device()
    # From now on xr.world_size() is `cores`, and graphs contain an all-reduce over all of them.
    xm.set_replication(device, xm.get_xla_supported_devices())
    model = train.Llama(config).to(device)
    optimizer = train.AdamW(model.parameters(), config)
    traced = train.TracedModel(model, config)
    torch_xla.sync()
    windows = torch.zeros(config.batch_size // cores, config.context + 1, dtype=torch.int32)
    step = record_call(train.train_step, traced, optimizer, windows, 0, False)
    evaluation = record_call(train.evaluate, traced, windows)
    return step, evaluation


def record_call(function, *arguments):
    """The graphs that function(*arguments) would run, as a list of Graph."""
    recorder = Recorder()
    torch_xla.sync = recorder.sync
    try:
        with SourceLines():
            function(*arguments)
    finally:
        torch_xla.sync = recorder.real_sync
    return list(recorder.graphs.values())
