"""An embedding service under load: clients ask for vectors of images, one model answers in batches.

    python examples/embedding_service.py --clients 16 --seconds 10

Each client is a thread that sends an image and waits for its vector. The service takes what has
come in, up to a batch, and runs the network once; so a faster network answers sooner and collects
smaller batches. The same load is run with the eager and with the fused network.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from concurrent.futures import Future
from typing import Annotated

import torch
import torchvision
import typer
from torch import Tensor, nn

import fused_resnet
from fused_resnet import testing


class Service:
    """Answers images (3, H, W) with vectors, in batches of those that wait.

    Args:
        model: makes (N, D) of (N, 3, H, W).
        most: images in a batch.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self.model, self.most = model, most
        self.batches: list[int] = []
        self._waiting: queue.SimpleQueue[tuple[Tensor, Future[Tensor]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def embed(self, image: Tensor) -> Future[Tensor]:
        """The vector, when it is there."""
        answer: Future[Tensor] = Future()
        self._waiting.put((image, answer))
        return answer

    def stop(self) -> None:
        """Answers what waits and ends; nobody may ask any more."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, last = [first], False
            while len(batch) < self.most and not self._waiting.empty():
                following = self._waiting.get()
                if following is None:
                    last = True
                    break
                batch.append(following)
            images = torch.stack([image for image, _ in batch])
            try:
                with torch.inference_mode():
                    vectors = self.model(images.to(memory_format=torch.channels_last))
            except Exception as error:
                for _, answer in batch:
                    answer.set_exception(error)
            else:
                for (_, answer), vector in zip(batch, vectors, strict=True):
                    answer.set_result(vector)
            self.batches.append(len(batch))
            if last:
                return


def network(name: str) -> nn.Module:
    """One of torchvision's without its classifier."""
    torch.manual_seed(0)
    model = testing.randomize_(torchvision.models.get_model(name)).eval()
    model.fc = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def load(service: Service, clients: int, seconds: float, size: int) -> list[float]:
    """How long each request took in milliseconds, of clients that ask again at once."""
    until = time.perf_counter() + seconds
    latencies: list[list[float]] = [[] for _ in range(clients)]

    def ask(own: list[float], seed: int) -> None:
        image = torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))
        while (since := time.perf_counter()) < until:
            service.embed(image).result()
            own.append(1e3 * (time.perf_counter() - since))

    threads = [threading.Thread(target=ask, args=(own, seed)) for seed, own in enumerate(latencies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [latency for own in latencies for latency in own]


def main(
    model: Annotated[str, typer.Option(help="One of torchvision's ResNets.")] = "resnet18",
    clients: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of load on each network.")] = 10,
    most: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    size: Annotated[int, typer.Option(min=32, help="Rows and columns of an image.")] = 224,
) -> None:
    """Prints throughput and latency of both."""
    for name in ("eager", "fused"):
        built = network(model)
        service = Service(fused_resnet.fuse(built) if name == "fused" else built, most)
        try:
            latencies = load(service, clients, seconds, size)
        finally:
            service.stop()
        p50, p99 = statistics.median(latencies), max(latencies)
        if len(latencies) >= 100:
            p99 = statistics.quantiles(latencies, n=100)[98]
        print(
            f"{name}: {len(latencies) / seconds:.1f} images/s, median {p50:.0f} ms, "
            f"99th percentile {p99:.0f} ms, {statistics.mean(service.batches):.1f} images a batch"
        )


if __name__ == "__main__":
    typer.run(main)
