"""A process that holds one exported directory in ONNX Runtime; see `bench_worker`."""

from deploy.bench import open_export
from deploy.bench_worker import main

if __name__ == "__main__":
    main(open_export)
