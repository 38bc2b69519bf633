//! Tokens to text: incremental detokenization and stop strings.
//!
//! Problem: tokens are pieces of bytes. A code point may be spread over several of them and a stop string may
//! begin in one and end in another, yet each piece of text should be sent as soon as it is certain. Idea: a
//! table with the bytes of every token. Text is the concatenation of bytes, decoded as UTF-8 with at most three
//! bytes kept back, and what could be the beginning of a stop string is held until it is decided. So a token
//! costs time proportional to its own length, and the pieces add up to the decoding of the whole. Price: the
//! table, about one megabyte for 150 000 tokens.
//!
//! Bytes that are not UTF-8 become U+FFFD as `String::from_utf8_lossy` does it. (The `ByteFallback` decoder of
//! the tokenizers crate writes one U+FFFD per byte of a damaged run instead; it can only know at the run's end.)
//! Nothing here knows tokenizers: whoever has one builds the table.

use std::sync::Arc;

/// The bytes of every token and which tokens are special.
#[derive(Debug)]
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// End of each token's bytes; it begins where the one before ends.
    ends: Vec<u32>,
    special: Vec<bool>,
    /// A decoded sequence loses one leading space, which its tokenizer put there (SentencePiece).
    leading_space: bool,
}

/// What an id outside the table reads as.
const UNKNOWN: &[u8] = "\u{fffd}".as_bytes();

impl Vocabulary {
    /// From each token's bytes and whether it is special, in order of their ids. `leading_space`: a whole
    /// decoded sequence loses one leading space.
    pub fn new(tokens: impl IntoIterator<Item = (Vec<u8>, bool)>, leading_space: bool) -> Vocabulary {
        let mut vocabulary =
            Vocabulary { bytes: Vec::new(), ends: Vec::new(), special: Vec::new(), leading_space };
        for (bytes, special) in tokens {
            vocabulary.bytes.extend_from_slice(&bytes);
            vocabulary.ends.push(vocabulary.bytes.len() as u32);
            vocabulary.special.push(special);
        }
        vocabulary
    }

    /// Tokens in the table.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether the table is empty.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of a token; U+FFFD for an id outside the table.
    pub fn bytes(&self, token: u32) -> &[u8] {
        let index = token as usize;
        let Some(end) = self.ends.get(index) else { return UNKNOWN };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..*end as usize]
    }

    /// Whether a token marks structure instead of text.
    pub fn is_special(&self, token: u32) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false)
    }

    /// One token alone as text; parts of code points read as U+FFFD.
    pub fn piece(&self, token: u32) -> String {
        String::from_utf8_lossy(self.bytes(token)).into_owned()
    }

    /// A whole sequence as text.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(tokens.len() * 4);
        for token in tokens.iter().filter(|token| !(skip_special && self.is_special(**token))) {
            bytes.extend_from_slice(self.bytes(*token));
        }
        let strip = usize::from(self.leading_space && bytes.first() == Some(&b' '));
        String::from_utf8_lossy(&bytes[strip..]).into_owned()
    }
}

/// Turns a sequence's tokens into text, piece by piece. The pieces, with that of [`Detokenizer::finish`], add up
/// to the lossy decoding of all bytes.
#[derive(Debug)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    skip_special: bool,
    /// The beginning of a code point, at most three bytes between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// For a sequence that continues a prompt. `skip_special` leaves special tokens out of the text.
    pub fn new(vocabulary: Arc<Vocabulary>, skip_special: bool) -> Detokenizer {
        Detokenizer { vocabulary, skip_special, pending: Vec::new() }
    }

    /// The text that `token` completes.
    pub fn push(&mut self, token: u32) -> String {
        if self.skip_special && self.vocabulary.is_special(token) {
            return String::new();
        }
        self.pending.extend_from_slice(self.vocabulary.bytes(token));
        self.take(false)
    }

    /// What is left: a code point that never became whole.
    pub fn finish(&mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> String {
        let mut text = String::with_capacity(self.pending.len());
        let mut kept = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            kept = 0;
            if invalid.is_empty() {
                continue;
            }
            if !all && is_unfinished(invalid) {
                // Only the last chunk counts; an unfinished one in the middle is damage.
                kept = invalid.len();
            }
            text.push('\u{fffd}');
        }
        if kept > 0 {
            text.pop();
        }
        self.pending.drain(..self.pending.len() - kept);
        text
    }
}

/// Whether more bytes could make a code point of these (and not: whatever follows, they are damaged).
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// Text of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Text that is now certain.
    pub text: String,
    /// The stop string that ended the sequence; nothing may follow.
    pub stopped: Option<String>,
}

/// Stop strings of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    /// The strings; empty ones are passed over.
    pub strings: Vec<String>,
    /// Whether the one found stays in the text.
    pub include: bool,
    /// Tokens before which they do not count.
    pub min_tokens: u32,
}

/// Text of one generated sequence, with stop strings.
#[derive(Debug)]
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: Stops,
    /// Decoded, but perhaps the beginning of a stop string. Shorter than the longest of them.
    held: String,
    /// Code points decoded so far, held ones included.
    decoded: usize,
    tokens: u32,
}

impl TextStream {
    /// An empty text.
    pub fn new(detokenizer: Detokenizer, mut stops: Stops) -> TextStream {
        stops.strings.retain(|stop| !stop.is_empty());
        TextStream { detokenizer, stops, held: String::new(), decoded: 0, tokens: 0 }
    }

    /// Whole code points decoded so far: where the next token's text begins.
    pub fn offset(&self) -> usize {
        self.decoded
    }

    /// Adds a token.
    pub fn push(&mut self, token: u32) -> Delta {
        let text = self.detokenizer.push(token);
        self.tokens = self.tokens.saturating_add(1);
        self.take(&text)
    }

    /// The sequence ended: what was held is text, unless it completes a stop string.
    pub fn finish(&mut self) -> Delta {
        let text = self.detokenizer.finish();
        let mut delta = self.take(&text);
        if delta.stopped.is_none() {
            delta.text.push_str(&self.held);
        }
        self.held.clear();
        delta
    }

    fn take(&mut self, text: &str) -> Delta {
        self.decoded += text.chars().count();
        self.held.push_str(text);
        if self.stops.strings.is_empty() || self.tokens < self.stops.min_tokens {
            return Delta { text: std::mem::take(&mut self.held), stopped: None };
        }
        if let Some((start, stop)) = self.found() {
            let end = if self.stops.include { start + stop.len() } else { start };
            let text = self.held[..end].to_owned();
            self.held.clear();
            return Delta { text, stopped: Some(stop) };
        }
        let certain = self.held.len() - self.undecided();
        let rest = self.held.split_off(certain);
        Delta { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// The stop string that is complete first, so that token borders make no difference; of several that end
    /// together, the longest.
    fn found(&self) -> Option<(usize, String)> {
        let ends = self.stops.strings.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, stop))
        });
        ends.min_by_key(|(end, start, _)| (*end, *start)).map(|(_, start, stop)| (start, stop.clone()))
    }

    /// Bytes at the end of `held` with which some stop string begins.
    fn undecided(&self) -> usize {
        let held = self.held.as_bytes();
        let of_one = |stop: &String| {
            let stop = stop.as_bytes();
            let longest = held.len().min(stop.len() - 1);
            (1..=longest).rev().find(|length| held.ends_with(&stop[..*length])).unwrap_or(0)
        };
        self.stops.strings.iter().map(of_one).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
