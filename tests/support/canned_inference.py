"""GrpcInference over a stand-in for the server's own client, which a test directs: for admission, deadlines
and the bounds of answers.
"""

import asyncio
import dataclasses

import numpy as np
from tritonclient.utils import InferenceServerException

from backends.contract import DENSE, LOGITS, N_TOKENS, TRUNCATED
from gateway.admission import AdmissionLimits
from gateway.context import Lane
from gateway.inference import GrpcInference
from tests.support.fake_inference import CLASSIFIER, PIPELINE, RERANKER

MODELS = [PIPELINE, dataclasses.replace(RERANKER), CLASSIFIER]


class Client:
    """The server: answers when it may, and keeps what it was asked."""

    def __init__(self):
        self.asked = []
        self.cancelled = 0
        self.release = asyncio.Event()
        self.release.set()
        self.fault = None
        self.width = 8

    async def infer(self, model, inputs, *, parameters, **options):
        count = inputs[0].shape()[0]
        if "deadline_ms" in (parameters or {}):
            self.asked.append(parameters)
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.fault is not None and "deadline_ms" in (parameters or {}):
            raise InferenceServerException(*self.fault)
        return Answer(count, self.width)

    async def close(self):
        pass


class Answer:
    def __init__(self, count, width=8):
        self.count = count
        self.width = width

    def as_numpy(self, name):
        rows = {
            DENSE: np.ones((self.count, self.width), np.float32),
            LOGITS: np.ones((self.count, 3), np.float32),
            N_TOKENS: np.ones((self.count, 1), np.int32),
            TRUNCATED: np.zeros((self.count, 1), bool),
        }
        return rows[name]


class Canned(GrpcInference):
    """Models of the tests, and a server that the test directs."""

    async def pipelines(self):
        return MODELS


async def canned_inference():
    """Of small queues."""
    limits = AdmissionLimits(2.0, 0.75, {Lane.INTERACTIVE: 300, Lane.BULK: 600}, 10**6)
    made = Canned(["127.0.0.1:9"], 300, 10**6, limits=limits)
    await made.servers[0].client.close()
    made.servers[0].client = Client()
    return made


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)
