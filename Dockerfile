# An image that serves one exported model:
#   docker build -t threefold-serve .
#   docker run --rm -p 8000:8000 -e THREEFOLD_API_KEY -v "$PWD/model.onnx:/models/model.onnx:ro" threefold-serve
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python -m venv /opt/threefold && /opt/threefold/bin/pip install --no-cache-dir '.[serve]'

FROM python:3.13-slim
COPY --from=build /opt/threefold /opt/threefold
RUN useradd --system --no-create-home --shell /usr/sbin/nologin threefold
USER threefold
ENV PATH=/opt/threefold/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["threefold", "serve"]
CMD ["/models/model.onnx", "--host", "0.0.0.0", "--port", "8000"]
