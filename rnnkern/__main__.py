"""``python -m rnnkern info | demo``."""

from __future__ import annotations

import argparse
import sys

from rnnkern import demo, dispatch, info


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rnnkern", description="torch.nn.RNN, LSTM and GRU with fused kernels under them"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="what is there, what a call takes and why")
    info_parser.add_argument(
        "--explain", metavar="CELL,T,B,H,DTYPE", help="only what this call would take and why: LSTM,512,64,512,bf16"
    )
    about = "train the same character model with torch.nn and with rnnkern, side by side"
    demo_parser = commands.add_parser("demo", help=about, description=about)
    demo.add_arguments(demo_parser)
    args = parser.parse_args(argv)
    try:
        dispatch.unavailable("cpp")
    except RuntimeError as error:  # RNNKERN_CPU_ISA asks for what is not there
        parser.error(str(error))
    if args.command == "info":
        try:
            print(info.explain(args.explain) if args.explain else info.text())
        except ValueError as error:
            info_parser.error(str(error))
        return 0
    try:
        return demo.main(args)
    except ValueError as error:
        demo_parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
