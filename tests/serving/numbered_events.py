"""python -m tests.serving.numbered_events PORT TOKENS PAUSE_S: the source of many streams.

Each answer is TOKENS events with the request's prompt and a number in them, PAUSE_S apart, each in
a write of its own. Bare asyncio, because the machine is to be busy with what stands before it.
"""

import asyncio
import json
import sys

import uvloop


def chunk(data: str) -> bytes:
    """Return an event, as a chunk of a chunked body."""
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
EMPTY = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 0\r\n\r\n"


async def answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int, pause: float
) -> None:
    """All requests of one connection."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                writer.write(EMPTY)
                continue
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            prompt = json.loads(await reader.readexactly(length))["prompt"]
            writer.write(HEAD)
            for i in range(tokens):
                text = f"{prompt}-{i}"
                writer.write(chunk(json.dumps({"choices": [{"index": 0, "text": text}]})))
                await writer.drain()
                await asyncio.sleep(pause)
            usage = {"prompt_tokens": 1, "completion_tokens": tokens}
            writer.write(chunk(json.dumps({"choices": [], "usage": usage})))
            writer.write(chunk("[DONE]") + b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the gateway has closed it
    finally:
        writer.close()


async def serve(port: int, tokens: int, pause: float) -> None:
    """Until it is killed."""
    server = await asyncio.start_server(
        lambda reader, writer: answer(reader, writer, tokens, pause),
        "127.0.0.1",
        port,
        backlog=2048,
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
