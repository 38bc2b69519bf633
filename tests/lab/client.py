"""A client of the API in its own machine: streams that remember when each token came, and what became of each request.

A stream's bytes are kept with their times as they arrive and taken apart when it is over, so that reading costs the
tested machine little. What a request may end in is written down in `Outcome`; anything else, and anything that
takes longer than a deadline, breaks oracle O2.
"""

import base64
import bisect
import enum
import http.client
import json
import socket
import statistics
import threading
import time
from array import array
from typing import Any, NamedTuple

from net import Lan

HTTP_PORT = 8620
PATH = "/v1/completions"
# Longest time without any byte before a request counts as hanging. Losing the whole network for a scenario takes 10 s.
HANGS_AFTER_S = 30.0
# Statuses that docs name for trouble inside: busy, no experts.
DOCUMENTED = (429, 503)
RECEIVE_BYTES = 65_536


class Outcome(enum.Enum):
    """How a request ended."""

    COMPLETE = "complete"
    # An error object, or an error event, that names what is wrong.
    REFUSED = "refused"
    # The connection broke before the end: allowed only where the router itself was killed.
    CUT = "cut"
    # We went away.
    LEFT = "left"
    HANGING = "hanging"
    # Anything else: half an answer that says it is whole, an error without a name.
    BROKEN = "broken"


class Told(NamedTuple):
    """What the greedy story must be: token ids and the digest of all logits."""

    token_ids: tuple[int, ...]
    digest: str


class Story:
    """One streamed completion."""

    def __init__(self, prompt: int, tokens: int) -> None:
        self.prompt, self.tokens = prompt, tokens
        self.began = time.monotonic()
        self.ended = 0.0
        self.outcome: Outcome | None = None
        self.status = 0
        self.headers: dict[str, str] = {}
        self.error = ""
        self.told = Told((), "")
        # Oracle O1, once compared: as far as it goes, it is the story it must be.
        self.right: bool | None = None
        # When each token came.
        self.times = array("d")
        self.arrived = array("d")
        self.pieces: list[bytes] = []

    def heard(self, piece: bytes) -> None:
        self.arrived.append(time.monotonic())
        self.pieces.append(piece)

    def take_apart(self) -> None:
        """Reads what arrived; knows the outcome unless somebody else did."""
        text, self.ended = b"".join(self.pieces), time.monotonic()
        ends = array("q")
        for piece in self.pieces:
            ends.append(len(piece) + (ends[-1] if ends else 0))
        self.pieces = []
        head, _, body = text.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 "):
            self.outcome = self.outcome or Outcome.CUT
            return
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        chunks, whole = unchunked(body) if self.headers.get("transfer-encoding") == "chunked" else ([(0, body)], True)
        start = len(head) + 4
        if self.status != 200:
            answer = b"".join(chunk for _, chunk in chunks)
            self.error = answer.decode(errors="replace")
            self.outcome = self.outcome or refusal(self.status, answer, self.headers)
            return
        self.read_events([(start + at, chunk) for at, chunk in chunks], ends, whole)

    def read_events(self, chunks: list[tuple[int, bytes]], ends: array, whole: bool) -> None:
        """Tokens with their times out of server-sent events; `ends[i]` is where the bytes of `arrived[i]` end."""
        ids: list[int] = []
        digest, finish, done, rest = "", None, 0, b""
        for at, chunk in chunks:
            *events, rest = (rest + chunk).split(b"\n\n")
            came = self.arrived[min(bisect.bisect_left(ends, at + len(chunk)), len(self.arrived) - 1)]
            for event in events:
                if event == b"data: [DONE]":
                    done += 1
                    continue
                if not event.startswith(b"data: "):
                    continue
                value = json.loads(event[6:])
                if "error" in value:
                    self.error = json.dumps(value["error"])
                    continue
                choice = value["choices"][0] if value["choices"] else {}
                for token in choice.get("token_ids") or ():
                    ids.append(token)
                    self.times.append(came)
                digest = choice.get("logits_digest") or digest
                finish = choice.get("finish_reason") or finish
        self.told = Told(tuple(ids), digest)
        complete = done == 1 and finish == "length" and len(ids) == self.tokens and whole and not rest
        if self.error and not complete:
            named = json.loads(self.error)
            ends_well = isinstance(named, dict) and named.get("message") and named.get("code")
            self.outcome = self.outcome or (Outcome.REFUSED if ends_well else Outcome.BROKEN)
        elif complete:
            self.outcome = Outcome.COMPLETE
        elif done or finish:
            self.outcome = Outcome.BROKEN
        else:
            self.outcome = self.outcome or Outcome.CUT

    def compare(self, expected: Told) -> None:
        """Is it, as far as it goes, the expected story? If so the tokens are forgotten: thousands of stories are kept."""
        length = len(self.told.token_ids)
        self.right = self.told.token_ids == expected.token_ids[:length]
        if self.outcome is Outcome.COMPLETE:
            self.right = self.told == expected
        if self.right:
            self.told = Told((), "")
        self.arrived = array("d")

    def longest_gap(self, since: float, until: float) -> float:
        """Longest time without a token between two instants, in seconds; the wait for the first one counts."""
        times = [self.began, *self.times]
        if self.outcome in (Outcome.REFUSED, Outcome.CUT, Outcome.HANGING):
            times.append(self.ended)
        gaps = [
            min(late, until) - max(early, since)
            for early, late in zip(times, times[1:])
            if late > since and early < until
        ]
        # A gap that began before the fault is a gap of the fault.
        return max(gaps, default=0.0)


def unchunked(body: bytes) -> tuple[list[tuple[int, bytes]], bool]:
    """Chunks of a chunked body with where each begins, and whether the last one came."""
    chunks, at = [], 0
    while (line := body.find(b"\r\n", at)) >= 0:
        length = int(body[at:line].split(b";")[0] or b"0", 16)
        start = line + 2
        if length == 0:
            return chunks, True
        chunks.append((start, body[start : start + length]))
        at = start + length + 2
    return chunks, False


def refusal(status: int, answer: bytes, headers: dict[str, str]) -> Outcome:
    """Whether an answer other than 200 is one that the documents name."""
    try:
        error = json.loads(answer)["error"]
        named = bool(error["message"]) and bool(error["code"]) and error["type"] is not None
    except (ValueError, KeyError, TypeError):
        return Outcome.BROKEN
    return Outcome.REFUSED if named and status in DOCUMENTED and "retry-after" in headers else Outcome.BROKEN


class Client:
    """Asks the router from a machine of the LAN."""

    def __init__(self, lan: Lan, key: str, machine: str = "client") -> None:
        self.lan, self.key, self.machine = lan, key, machine

    def ask(self, method: str, path: str, body: Any = None, seconds: float = HANGS_AFTER_S) -> tuple[int, bytes]:
        """A plain request; status and body. Raises `OSError` where the router cannot be reached."""
        connection = http.client.HTTPConnection("router")
        connection.sock = self.lan.connect(self.machine, "router", HTTP_PORT, seconds)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", "Connection": "close"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def json(self, path: str, seconds: float = HANGS_AFTER_S) -> Any:
        status, body = self.ask("GET", path, seconds=seconds)
        if status != 200:
            raise ConnectionError(f"{path}: {status}: {body[:200]!r}")
        return json.loads(body)

    def open(self, prompt: int, tokens: int, receive_bytes: int | None = None) -> tuple[Story, socket.socket]:
        """Sends the request of a story; nothing is read yet. `receive_bytes`: how little the system buffers."""
        story = Story(prompt, tokens)
        return story, self.send(PROMPTS[prompt], tokens, receive_bytes)

    def send(self, prompt: str | list[int], tokens: int, receive_bytes: int | None = None) -> socket.socket:
        """Asks for a stream of tokens."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 1, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True, "logits_digest": True}
        text = json.dumps(body)
        head = [f"POST {PATH} HTTP/1.1", "Host: router", f"Authorization: Bearer {self.key}", "Connection: close"]
        head += ["Content-Type: application/json", f"Content-Length: {len(text)}", "", text]
        stream = self.lan.connect(self.machine, "router", HTTP_PORT, HANGS_AFTER_S)
        if receive_bytes:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        stream.sendall("\r\n".join(head).encode())
        return stream

    def tell(self, prompt: int, tokens: int, now: "Teller | None" = None) -> Story:
        """One story from beginning to end."""
        try:
            story, stream = self.open(prompt, tokens)
        except OSError as error:
            story = Story(prompt, tokens)
            story.outcome, story.error, story.ended = Outcome.CUT, str(error), time.monotonic()
            return story
        if now:
            now.story = story
        with stream:
            try:
                while piece := stream.recv(RECEIVE_BYTES):
                    story.heard(piece)
            except TimeoutError:
                story.outcome = Outcome.HANGING
            except OSError:
                story.outcome = Outcome.CUT
        story.take_apart()
        return story


class Teller(threading.Thread):
    """A client that asks for one story after another until it is told to stop."""

    def __init__(self, client: Client, prompt: int, tokens: int, expected: Told) -> None:
        super().__init__(daemon=True)
        self.client, self.prompt, self.tokens, self.expected = client, prompt, tokens, expected
        self.story: Story | None = None
        self.stories: list[Story] = []
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            story = self.client.tell(self.prompt, self.tokens, self)
            story.compare(self.expected)
            self.story = None
            self.stories.append(story)
            if story.outcome is not Outcome.COMPLETE:
                # As a client would, but without the seconds it is told to wait: the lab wants to know when it is over.
                self.stopping.wait(0.02)

    def last_byte(self) -> float:
        """When something last arrived."""
        story = self.story
        if story is not None and story.arrived:
            return story.arrived[-1]
        return self.stories[-1].ended if self.stories else 0.0


class Load:
    """Several tellers at once."""

    def __init__(self, client: Client, expected: list[Told]) -> None:
        self.tellers = [Teller(client, prompt, len(told.token_ids), told) for prompt, told in enumerate(expected)]
        for teller in self.tellers:
            teller.start()

    def flowing(self, seconds: float) -> bool:
        """Waits until every stream has had bytes after this call; whether they all did in time."""
        now = time.monotonic()
        while time.monotonic() < now + seconds:
            if all(teller.last_byte() > now for teller in self.tellers):
                return True
            time.sleep(0.005)
        return False

    def finish(self) -> list[Story]:
        """Lets the running stories end; all of them, in the order in which they began."""
        for teller in self.tellers:
            teller.stopping.set()
        for teller in self.tellers:
            teller.join()
        stories = [story for teller in self.tellers for story in teller.stories]
        return sorted(stories, key=lambda story: story.began)


def speed(stories: list[Story], since: float, until: float) -> float:
    """Tokens per second of all streams between two instants."""
    count = sum(bisect.bisect_left(story.times, until) - bisect.bisect_left(story.times, since) for story in stories)
    return count / (until - since)


def typical_gap(stories: list[Story]) -> float:
    """Median time between two tokens of a stream, in seconds."""
    gaps = [late - early for story in stories for early, late in zip(story.times, story.times[1:])]
    return statistics.median(gaps) if gaps else 0.0


def gaps_after(stories: list[Story], since: float, first: int, count: int) -> list[float]:
    """Times between tokens of each stream, from the `first` one after an instant on, in seconds."""
    found = []
    for story in stories:
        at = bisect.bisect_left(story.times, since)
        if 0 < at < len(story.times):
            times = story.times[at + first : at + first + count + 1]
            found += [late - early for early, late in zip(times, times[1:])]
    return found


def longest_gap(stories: list[Story], since: float, until: float) -> float:
    """Longest gap of any stream between two instants."""
    return max(
        (story.longest_gap(since, until) for story in stories if story.ended > since and story.began < until),
        default=0.0,
    )


def find_secret(frames: list[bytes], secret: bytes) -> int:
    """Frames that contain the secret, as it is or as text."""
    forms = {
        secret,
        secret.hex().encode(),
        base64.b64encode(secret).rstrip(b"="),
        base64.urlsafe_b64encode(secret).rstrip(b"="),
    }
    return sum(any(form in frame for form in forms) for frame in frames)


PROMPTS = [
    "Once upon a time there was a poor woodcutter who lived with his wife",
    "The king said to his three sons",
    "In a dark forest there stood a little house, and in it",
    "There was once a girl whose mother was dead, and",
    "A wolf came to the door and knocked",
    "The old miller had nothing left but a cat",
    "Early in the morning the princess went into the garden",
    "When the soldier came home from the war",
]
# Some 1500 tokens, of a context of 2048.
PROMPTS.append(". ".join(PROMPTS * 12))
LONG_PROMPT = len(PROMPTS) - 1
