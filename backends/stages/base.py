"""What all stages share: the server's objects in, plain tensors through, the server's objects out.

An exception that leaves execute() would fail every request of the batch and send its traceback to the
clients, so each request gets its own error, and a batch that fails as a whole is run again one by one.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from backends import lean_imports
from backends.checkpoint import Checkpoint
from backends.contract import NOT_WELL, ErrorCode
from backends.errors import BackendError, RequestError
from backends.heads.dense import has_own_code
from backends.log_format import Formatter
from backends.options import ServingOptions
from backends.process_memory import give_back
from backends.source import resolve
from backends.stages.request import StageRequest
from backends.stages.response import Answer, failed, out_of_memory, to_response

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
"""The entry's parameter that holds the checkpoint's reference."""
HEADS = "heads"
"""The entry's parameter that names the pipeline's heads."""


@dataclass(frozen=True)
class StageContext:
    """What the server tells a stage about its entry."""

    name: str
    checkpoint: Checkpoint
    options: ServingOptions
    parameters: Mapping[str, str]
    device: str
    """cpu, or cuda:N as the server placed this instance."""

    @property
    def heads(self) -> frozenset[str]:
        """The heads of the pipeline that the entry belongs to."""
        return frozenset(filter(None, self.parameters.get(HEADS, "").split(",")))


class Stage(ABC):
    """A Python-backend model. Subclasses say what happens to a batch, in terms of plain tensors."""

    ailment: str | None = None
    """Why it will answer right no more, and must be replaced; pings are told."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Called once by the server when it loads the entry."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Formatter(f"{args['model_name']}: %(levelname)s %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        parameters = {
            name: value["string_value"]
            for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        try:
            options = ServingOptions.from_parameters(parameters)
            checkpoint = Checkpoint.read(
                resolve(parameters[CHECKPOINT]), options.max_length, options.rerank_prompt
            )
            if has_own_code(checkpoint):
                lean_imports.undo()
            is_gpu = args["model_instance_kind"] == "GPU"
            device = f"cuda:{args['model_instance_device_id']}" if is_gpu else "cpu"
            self.setup(StageContext(args["model_name"], checkpoint, options, parameters, device))
        except BackendError as error:
            # The server prints the text of this exception as the reason why the entry is not ready.
            raise pb_utils.TritonModelException(str(error)) from error
        lean_imports.finish()
        if not gc.isenabled():
            # The process is this stage's own, and its model.py has put that off. What lives by now lives for
            # ever: to look through all of torch for garbage takes 0.2 s, in which no request is answered.
            gc.collect()
            gc.freeze()
            gc.enable()
            give_back()

    @abstractmethod
    def setup(self, context: StageContext) -> None:
        """Loads what the stage needs. Raises BackendError."""

    @abstractmethod
    def run(self, batch: Sequence[StageRequest]) -> Sequence[Answer | RequestError]:
        """One answer or error for each request, in order."""

    def cut(self, batch: Sequence[StageRequest]) -> Sequence[range]:
        """Neighbours in the batch that run() is given at once; all of them, unless a stage has reasons."""
        return [range(len(batch))]

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether what was raised says that the device has no room for so much at once."""
        return False

    def free_memory(self) -> None:  # noqa: B027 (most stages keep nothing)
        """Gives back what is kept for later use."""

    def check_device(self) -> None:  # noqa: B027 (a processor does not fail so)
        """Raises where the device will compute nothing more for this process."""

    def find_ailment(self) -> str | None:
        """Looked for at every ping, so it must be cheap."""
        return self.ailment

    def answer_ping(self, request: StageRequest) -> None:
        """Without outputs where all is well."""
        ailment = self.find_ailment()
        self.respond(
            request, {} if ailment is None else RequestError(ErrorCode.INTERNAL, f"{NOT_WELL}{ailment}")
        )

    def respond(self, request: StageRequest, answer: Answer | RequestError) -> None:
        """Answers a request of which execute() returns None. What cannot be sent is told in an error, and if
        that cannot be sent either, nobody can answer the request any more: its client is told when the stage
        is replaced.
        """
        try:
            request.send(to_response(request, answer))
        except Exception:
            logger.exception("the answer to request %s cannot be sent", request.id)
            try:
                request.send(to_response(request, failed()))
            except Exception:
                # So it is whenever the first attempt came as far as the server's own code: one response is
                # all that it allows (server 2.51).
                logger.exception("nor can it be refused")
                self.ailment = "an answer could not be sent, and whoever asked waits in vain"

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Called by the server with the requests of one batch.

        What is past its deadline is not run. Answers of all groups but the last are sent while the batch
        still runs, so that their memory is free and the next stage begins; None stands in their place
        (server 2.51).
        """
        responses: list[Any] = [None] * len(requests)
        batch: list[StageRequest] = []
        places: list[int] = []
        for place, request in enumerate(map(StageRequest, requests)):
            if request.is_ping:
                self.answer_ping(request)
            elif (refusal := _refuse_late(request)) is not None:
                responses[place] = refusal
            else:
                batch.append(request)
                places.append(place)
        groups = self.cut(batch) if batch else []
        for group in groups:
            answers = self._run_group([batch[i] for i in group])
            for i, answer in zip(group, answers, strict=True):
                if group is groups[-1]:
                    responses[places[i]] = to_response(batch[i], answer)
                else:
                    self.respond(batch[i], answer)
            del answers, answer
        return responses

    def _run_group(self, batch: Sequence[StageRequest]) -> list[Answer | RequestError]:
        try:
            return list(self.run(batch))
        except Exception as error:
            lacks_memory = self.is_out_of_memory(error)
            if not lacks_memory:
                logger.exception("a batch of %d requests failed; running them one by one", len(batch))
                return [self._run_alone(request) for request in batch]
        # Out here the error, and all that its frames hold of the device, is gone.
        self.free_memory()
        middle = len(batch) // 2
        if not middle:
            return [self._run_alone(batch[0])]
        logger.warning("no memory for a batch of %d requests; running it in halves", len(batch))
        return [*self._run_group(batch[:middle]), *self._run_group(batch[middle:])]

    def _run_alone(self, request: StageRequest) -> Answer | RequestError:
        try:
            return self.run([request])[0]
        except RequestError as error:
            return error
        except Exception as error:
            logger.exception("request %s failed", request.id)
            if self.is_out_of_memory(error):
                return out_of_memory("this request")
            self.examine()
            return failed()

    def examine(self) -> None:
        """After a failure: finds out whether the device fails whatever is asked of it."""
        try:
            self.check_device()
        except Exception as error:
            logger.exception("the device fails")
            self.ailment = f"its device fails whatever it computes ({type(error).__name__})"


def _refuse_late(request: StageRequest) -> Any:
    """The response to a request whose deadline has passed, else None."""
    try:
        request.check_deadline()
    except RequestError as error:
        return to_response(request, error)
    return None
