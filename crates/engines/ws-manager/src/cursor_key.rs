//! Cursors lie in the log stream, and the place that one names is known by the bytes before it: bytes of the output before
//! its secrets are masked. So those are encrypted, in the manner of AES-SIV: the tag is a MAC of what is hidden, and the key
//! stream begins with the tag. The same place has the same cursor, and nothing random is needed.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use kiln_domain::engine::Cursor;
use sha2::Sha256;

use crate::overlap::Place;

const TAG: usize = 16;
const OF_TAGS: u8 = 0;
const OF_THE_STREAM: u8 = 1;

/// The same in every process of an installation.
pub struct CursorKey(Hmac<Sha256>);

impl CursorKey {
    pub fn new(key: [u8; 32]) -> Self {
        // As HMAC itself does with a key that is shorter than its block.
        let mut block = [0; 64];
        block.iter_mut().zip(key).for_each(|(to, from)| *to = from);
        Self(Hmac::new(&block.into()))
    }

    pub(crate) fn cursor(&self, place: &Place) -> Cursor {
        if *place == Place::default() {
            return Cursor::default();
        }
        let mut hidden = place.tail().to_vec();
        let tag = self.tag(place.offset, &hidden);
        self.apply_stream(&tag, &mut hidden);
        let text = STANDARD_NO_PAD.encode([tag.as_slice(), &hidden].concat());
        Cursor::new(format!("{}.{text}", place.offset))
    }

    /// A cursor that isn't of this key is the beginning.
    pub(crate) fn place(&self, cursor: &Cursor) -> Place {
        self.opened(cursor.as_str()).unwrap_or_default()
    }

    fn opened(&self, text: &str) -> Option<Place> {
        let (offset, hidden) = text.split_once('.')?;
        let (offset, hidden) = (offset.parse().ok()?, STANDARD_NO_PAD.decode(hidden).ok()?);
        let (tag, tail) = hidden.split_at_checked(TAG)?;
        let mut tail = tail.to_vec();
        self.apply_stream(tag, &mut tail);
        (self.tag(offset, &tail) == tag).then(|| Place::new(offset, tail))
    }

    fn tag(&self, offset: u64, tail: &[u8]) -> Vec<u8> {
        let mut tag = self.mac(OF_TAGS, &[&offset.to_be_bytes(), tail]);
        tag.truncate(TAG);
        tag
    }

    fn apply_stream(&self, tag: &[u8], bytes: &mut [u8]) {
        for (block, number) in bytes.chunks_mut(32).zip(0_u32..) {
            let stream = self.mac(OF_THE_STREAM, &[tag, &number.to_be_bytes()]);
            for (byte, other) in block.iter_mut().zip(stream) {
                *byte ^= other;
            }
        }
    }

    fn mac(&self, purpose: u8, parts: &[&[u8]]) -> Vec<u8> {
        let mac = self.0.clone().chain_update([purpose]);
        let mac = parts.iter().fold(mac, |mac, part| mac.chain_update(part));
        mac.finalize().into_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_opens_a_cursor_and_no_byte_of_the_output_shows() {
        let (key, other) = (CursorKey::new([1; 32]), CursorKey::new([2; 32]));
        for count in [1, 5, 96, 500] {
            let output: Vec<u8> = b"password=hunter2 ".iter().copied().cycle().take(count).collect();
            let place = Place::default().advanced(&output);
            let cursor = key.cursor(&place);
            assert_eq!(key.place(&cursor), place);
            assert_eq!(key.cursor(&place), cursor);
            assert_eq!(other.place(&cursor), Place::default());
            let (offset, hidden) = cursor.as_str().split_once('.').unwrap();
            let further = Cursor::new(format!("{}.{hidden}", offset.parse::<u64>().unwrap() + 1));
            assert_eq!(key.place(&further), Place::default(), "a tag is of one offset");
            let hidden = STANDARD_NO_PAD.decode(hidden).unwrap();
            assert!(count < 5 || !hidden.windows(5).any(|window| output.windows(5).any(|w| w == window)));
        }
        assert_eq!(key.cursor(&Place::default()), Cursor::default());
        assert_eq!(key.place(&Cursor::new("nonsense")), Place::default());
        assert_eq!(key.place(&Cursor::new("7.")), Place::default());
    }
}
