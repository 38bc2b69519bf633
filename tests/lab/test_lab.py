"""The lab's own pure parts: an oracle that cannot fail proves nothing. Needs no root: `python3 -m unittest discover tests/lab`."""

import importlib.machinery
import importlib.util
import json
import pathlib
import random
import socket
import tempfile
import unittest
import unittest.mock

import disks
import faketime
import mdns
import oracles
import relay
from client import Outcome, Story, Told, find_secret, refusal, unchunked
from cluster import Footprint
from registry import chosen

HERE = pathlib.Path(__file__).parent
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def script(name: str):
    """A script without an ending, as a module."""
    loader = importlib.machinery.SourceFileLoader(name, str(HERE / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def event(value: object) -> bytes:
    text = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
    return f"{len(text):x}\r\n".encode() + text + b"\r\n"


def token(number: int) -> bytes:
    return event({"choices": [{"token_ids": [number], "finish_reason": None}]})


LAST = event({"choices": [{"token_ids": [], "finish_reason": "length", "logits_digest": "d"}]})
DONE = event(b"[DONE]") + b"0\r\n\r\n"


def heard(*pieces: bytes, tokens: int = 2) -> Story:
    story = Story(0, tokens)
    for piece in pieces:
        story.heard(piece)
    story.take_apart()
    return story


class Streams(unittest.TestCase):
    def test_a_whole_story_is_complete_however_it_is_cut_into_pieces(self) -> None:
        text = HEAD + token(7) + token(8) + LAST + DONE
        for length in (1, 5, 64, len(text)):
            story = heard(*(text[at : at + length] for at in range(0, len(text), length)))
            self.assertEqual((story.outcome, story.told, len(story.times)), (Outcome.COMPLETE, Told((7, 8), "d"), 2))

    def test_what_lacks_its_end_is_not_complete(self) -> None:
        self.assertIs(heard(HEAD + token(7)).outcome, Outcome.CUT)
        self.assertIs(heard(HEAD + token(7) + token(8) + LAST).outcome, Outcome.BROKEN)
        self.assertIs(heard(HEAD + token(7) + LAST + DONE).outcome, Outcome.BROKEN)
        self.assertIs(heard(HEAD + token(7) + token(8) + LAST + event(b"[DONE]") + DONE).outcome, Outcome.BROKEN)
        self.assertIs(heard(b"").outcome, Outcome.CUT)

    def test_an_error_event_needs_a_name(self) -> None:
        named = event({"error": {"message": "experts 3.1 have no holder", "code": "experts_missing", "type": "x"}})
        self.assertIs(heard(HEAD + token(7) + named + b"0\r\n\r\n").outcome, Outcome.REFUSED)
        self.assertIs(
            heard(HEAD + token(7) + event({"error": {"message": "x"}}) + b"0\r\n\r\n").outcome, Outcome.BROKEN
        )

    def test_a_status_other_than_200_needs_a_name_and_a_time(self) -> None:
        body = json.dumps({"error": {"message": "m", "code": "c", "type": "t"}}).encode()
        self.assertIs(refusal(503, body, {"retry-after": "1"}), Outcome.REFUSED)
        self.assertIs(refusal(503, body, {}), Outcome.BROKEN)
        self.assertIs(refusal(500, body, {"retry-after": "1"}), Outcome.BROKEN)
        self.assertIs(refusal(503, b"oops", {"retry-after": "1"}), Outcome.BROKEN)

    def test_another_token_or_another_digest_is_another_story(self) -> None:
        text = HEAD + token(7) + token(8) + LAST + DONE
        for expected, right in ((Told((7, 8), "d"), True), (Told((7, 9), "d"), False), (Told((7, 8), "e"), False)):
            story = heard(text)
            story.compare(expected)
            self.assertEqual(story.right, right)
        begun = heard(HEAD + token(7))
        begun.compare(Told((7, 8), "d"))
        self.assertTrue(begun.right)

    def test_gaps_count_from_the_request_and_within_the_window(self) -> None:
        story = Story(0, 3)
        story.began, story.ended = 0.0, 10.0
        story.times.extend([1.0, 1.5, 4.0, 4.1])
        story.outcome = Outcome.COMPLETE
        self.assertEqual(story.longest_gap(0.0, 10.0), 2.5)
        self.assertEqual(story.longest_gap(2.0, 10.0), 2.0)
        self.assertAlmostEqual(story.longest_gap(4.05, 10.0), 0.05)
        story.outcome = Outcome.HANGING
        self.assertAlmostEqual(story.longest_gap(4.05, 10.0), 5.9)

    def test_chunks_know_where_they_are(self) -> None:
        self.assertEqual(unchunked(b"3\r\nabc\r\n0\r\n\r\n"), ([(3, b"abc")], True))
        self.assertEqual(unchunked(b"3\r\nabc\r\n"), ([(3, b"abc")], False))


class Oracles(unittest.TestCase):
    def test_each_oracle_can_fail(self) -> None:
        good = heard(HEAD + token(7) + token(8) + LAST + DONE)
        good.compare(Told((7, 8), "d"))
        hung = heard(HEAD + token(7))
        hung.outcome = Outcome.HANGING
        hung.compare(Told((9, 8), "d"))
        result = oracles.Result("1", "x", runs=1)
        result.judge([good])
        self.assertIs(result.verdict, oracles.Verdict.PASS)
        result.judge([hung])
        self.assertEqual((str(result.o1), str(result.o2)), ("1/2", "1/2"))
        self.assertIs(result.verdict, oracles.Verdict.FAIL)

    def test_nothing_that_did_not_hit_passes(self) -> None:
        self.assertIs(oracles.Result("1", "x", runs=0, void=3).verdict, oracles.Verdict.VOID)

    def test_what_was_interrupted_has_not_passed_and_what_had_failed_still_has(self) -> None:
        result = oracles.Result("1", "x", runs=1, interrupted=True)
        self.assertIs(result.verdict, oracles.Verdict.PART)
        result.target_met(False, "too late")
        self.assertIs(result.verdict, oracles.Verdict.FAIL)

    def test_a_cut_is_good_only_where_it_is_expected(self) -> None:
        cut = heard(HEAD + token(7))
        cut.compare(Told((7, 8), "d"))
        for allowed in (True, False):
            result = oracles.Result("1", "x", runs=1)
            result.judge([cut], cut=allowed)
            self.assertEqual(not result.o2.broken, allowed)

    def test_growth_is_seen(self) -> None:
        before = Footprint(100 << 10, 20)
        self.assertEqual(oracles.grown(before, Footprint(125 << 10, 24)), "")
        self.assertIn("MiB", oracles.grown(before, Footprint(127 << 10, 20)))
        self.assertIn("descriptors", oracles.grown(before, Footprint(100 << 10, 25)))

    def test_quantiles_are_values_that_were_seen(self) -> None:
        values = [float(value) for value in range(1, 101)]
        self.assertEqual((oracles.quantile(values, 0.5), oracles.quantile(values, 0.99)), (50.0, 99.0))
        self.assertEqual(oracles.quantile([3.0], 0.99), 3.0)


class Frames(unittest.TestCase):
    def datagram(self, payload: bytes) -> bytes:
        length = 8 + len(payload)
        addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
        header = (
            bytes([0x45, 0, *(20 + length).to_bytes(2, "big"), 0, 1, 0x40, 0, 64, socket.IPPROTO_UDP, 0, 0]) + addresses
        )
        udp = bytes([0, 7, 0, 9, *length.to_bytes(2, "big"), 0, 0])
        return bytes(12) + b"\x08\x00" + header + udp + payload

    def test_one_bit_of_the_payload_turns_and_the_checksum_agrees(self) -> None:
        frame = self.datagram(bytes(range(101)))
        for seed in range(50):
            bent = relay.with_a_bit_turned(frame, random.Random(seed))
            wrong = [bin(a ^ b).count("1") for a, b in zip(frame[42:], bent[42:])]
            self.assertEqual(sum(wrong), 1)
            self.assertEqual(frame[:40], bent[:40])
            pseudo = bent[26:34] + bytes([0, socket.IPPROTO_UDP]) + bent[38:40]
            self.assertEqual(relay.internet_checksum(pseudo + bent[34:]), 0)

    def test_other_frames_are_left_alone(self) -> None:
        frame = bytearray(self.datagram(b"abc"))
        frame[23] = socket.IPPROTO_TCP
        self.assertIsNone(relay.with_a_bit_turned(bytes(frame), random.Random(1)))
        self.assertIsNone(relay.with_a_bit_turned(b"\0" * 60, random.Random(1)))

    def test_the_same_seed_gives_the_same_fates(self) -> None:
        def fates(seed: int) -> tuple[dict[str, int], list[int]]:
            cable = relay.Cable([])
            cable.change(
                {
                    **relay.CLEAN,
                    "loss": 0.2,
                    "duplicate": 0.2,
                    "reorder": 0.2,
                    "jitter_ms": 1,
                    "delay_ms": 2,
                    "seed": seed,
                }
            )
            for number in range(500):
                cable.take(number % 2, number.to_bytes(60, "big"), number / 1e3)
            return cable.count, [entry[1] for entry in sorted(cable.waiting)]

        self.assertEqual(fates(3), fates(3))
        self.assertNotEqual(fates(3), fates(4))
        self.assertGreater(fates(3)[0]["lost"], 60)

    def test_a_secret_is_found_in_every_form(self) -> None:
        secret = bytes(range(16))
        self.assertEqual(find_secret([b"x" + secret + b"y", secret.hex().encode(), b"nothing"], secret), 2)


class Story_(unittest.TestCase):
    README = "a\n<!-- story -->\n1. x\n   ```sh\n   # on the router; first\n   moemesh token\n   # on the first node\n   A=b moemesh node --join TOKEN\n   ```\n<!-- /story -->\n"

    def test_blocks_know_their_machine_and_whether_they_stay(self) -> None:
        found = script("story").blocks(self.README)
        self.assertEqual(
            [(block.line, block.machine, block.stays) for block in found], [(5, "router", False), (7, "first", True)]
        )
        self.assertEqual(found[0].text, "# on the router; first\nmoemesh token\n")

    def test_a_block_without_a_machine_is_a_mistake(self) -> None:
        with self.assertRaisesRegex(ValueError, "line 5"):
            script("story").blocks(self.README.replace("# on the router; first\n   ", ""))
        with self.assertRaisesRegex(ValueError, "not marked"):
            script("story").blocks("nothing")


class Rows(unittest.TestCase):
    def test_rows_are_chosen_by_number_and_unknown_ones_are_refused(self) -> None:
        script("lab")
        self.assertEqual([entry.row for entry in chosen("2,7")], ["2", "2b", "7"])
        self.assertEqual([entry.row for entry in chosen("2b")], ["2b"])
        self.assertEqual([entry.row for entry in chosen("=2")], ["2"])
        with self.assertRaisesRegex(ValueError, "no row 99"):
            chosen("99")

    def test_every_row_of_the_issue_is_there(self) -> None:
        script("lab")
        rows = {int("".join(filter(str.isdigit, entry.row))) for entry in chosen(None)}
        self.assertLessEqual({*range(1, 17), 18, 20, 21, 22, 23, *range(27, 34), *range(35, 41)}, rows)


class Clocks(unittest.TestCase):
    def test_a_clock_is_a_file_that_is_set_as_a_whole_and_kept(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            clock = pathlib.Path(folder) / "node-1.clock"
            self.assertEqual(faketime.environment(clock, "+10y")["FAKETIME_TIMESTAMP_FILE"], str(clock))
            faketime.set_clock(clock, "-10y")
            # A process that is started again finds the clock as it was set.
            faketime.environment(clock, "+10y")
            self.assertEqual(clock.read_text(), "-10y\n")
            self.assertEqual([path.name for path in clock.parent.iterdir()], [clock.name])

    def test_without_the_library_it_is_said_what_to_install(self) -> None:
        with unittest.mock.patch.object(faketime, "PLACES", ("/nowhere",)):
            self.assertIn("apt-get install libfaketime", faketime.missing())


class Rot(unittest.TestCase):
    def test_one_bit_is_flipped_and_flipped_back(self) -> None:
        script("lab")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "blob"
            path.write_bytes(bytes(4))
            disks.flip(path, 19)
            self.assertEqual(path.read_bytes(), bytes([0, 0, 8, 0]))
            disks.flip(path, 19)
            self.assertEqual(path.read_bytes(), bytes(4))


class Claims(unittest.TestCase):
    def test_a_peer_id_is_the_key_as_libp2p_writes_it(self) -> None:
        # Of the public key whose secret half is 32 bytes of 1.
        key = bytes.fromhex("8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c")
        self.assertEqual(mdns.peer_id(key), "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5")

    def test_a_packet_has_a_record_and_a_text_for_each_claim_and_fits_into_a_frame(self) -> None:
        claims = [(bytes([number]) * 32, "10.77.0.7", 60_000 + number) for number in range(mdns.NAMES_PER_PACKET)]
        sent = mdns.packet(claims)
        self.assertLess(len(sent), 1400)
        self.assertEqual(sent.count(mdns.SERVICE), len(claims))
        for key, address, port in claims:
            self.assertIn(f"dnsaddr=/ip4/{address}/tcp/{port}/p2p/{mdns.peer_id(key)}".encode(), sent)


if __name__ == "__main__":
    unittest.main()
