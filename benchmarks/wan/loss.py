"""What becomes of bulk where packets get lost, by the kernel's congestion control?

The namespaces' default is set, so that it holds for everything on both sides.
"""

from benchmarks.wan.bulk import AUTO, CONNECTIONS, arrived, many, stream
from benchmarks.wan.question import Entry, Part, Question, bare, peer


def one_way(title: str, *, down: bool) -> Part:
    return Part(
        title=title,
        links=("metro-bbr", "metro-cubic"),
        bare="iperf3",
        entries=(
            Entry("iperf3", bare(down=down)),
            Entry("druvarpc", peer("druvarpc", "bulk", stream(down=down))),
            Entry("druvarpc, auto", peer("druvarpc", "bulk", many(down, AUTO))),
            Entry("grpc.aio", peer("grpc_aio", "bulk", stream(down=down))),
        ),
        tables=(
            arrived("iperf3"),
            CONNECTIONS,
        ),
    )


QUESTION = Question(
    title="Loss",
    what=(
        "Bulk, as above, at 20 ms and 100 Mbit/s, where every twentieth packet gets lost, in "
        "either direction: with BBR and CUBIC on both sides."
    ),
    parts=(one_way("Upload", down=False), one_way("Download", down=True)),
)
