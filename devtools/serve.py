"""`dev.py serve`: ComfyUI with its page and this pack. Workflows and settings made there stay in .host/serve, pictures go to output/."""
import argparse
import os
import socket
import sys
from pathlib import Path

from .devices import accelerator
from .server import Server, ServerError, free_port

ROOT = Path(__file__).resolve().parent.parent
USUAL_PORT = 8188


def is_free(port: int) -> bool:
    """Whether nobody listens on that loopback port."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def main(argv: list[str]) -> int:
    """Runs until Ctrl-C; further arguments go to ComfyUI."""
    parser = argparse.ArgumentParser(prog="dev.py serve", description=__doc__)
    parser.add_argument("--port", type=int, help=f"port to listen on (default: {USUAL_PORT} if it is free, else any)")
    options, rest = parser.parse_known_args(argv)
    port = options.port or (USUAL_PORT if is_free(USUAL_PORT) else free_port())
    if not is_free(port):
        print(f"Port {port} is in use: choose another with --port, or leave it out.", file=sys.stderr)
        return 1
    output = ROOT / "output"
    output.mkdir(exist_ok=True)
    server = Server(Path(os.environ["COMFYUI_PATH"]), ["--output-directory", str(output), "--preview-method", "auto", *rest],
                    base=ROOT / ".host" / "serve", port=port, cpu="--cpu" not in rest and not accelerator(), echo=True)
    try:
        with server:
            print(f"\nComfyUI with Palimpsest: {server.address}   (sample workflows: Workflow > Browse Templates > palimpsest; Ctrl-C ends it)\n", flush=True)
            return server.process.wait()
    except KeyboardInterrupt:
        print("\nStopped.")
        return 0
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
