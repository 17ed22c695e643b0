//! The names of cached answers: an HMAC of everything that the answer depends on, the credentials included.
//!
//! So an answer that was made with credentials is found only by who shows the same, and a key tells nothing of them. The
//! HMAC's own key comes from the installation's seal key: the same in every replica, which share their answers.

use hmac::{Hmac, KeyInit as _, Mac as _};
use kiln_bus::seal::{OpenKey, SealError};
use sha2::Sha256;

/// What a key begins with, so that an entry of a release that meant something else is not found.
const RELEASE: &str = "2";

#[derive(Clone)]
pub(crate) struct Keys {
    mac: Hmac<Sha256>,
}

/// As whom something was asked.
pub(crate) enum Asker<'a> {
    Anonymous,
    /// By the installation's credentials, whatever they are at the moment: for all who may use them.
    Installation,
    /// Of the asker's own: its kind, the user, the secret.
    Shows([&'a str; 3]),
}

impl Keys {
    pub(crate) fn new(open_key: &OpenKey) -> Result<Self, SealError> {
        let key = open_key.derive("kiln resolver: names of cached answers")?;
        let mac = Hmac::new_from_slice(&key).map_err(|_| SealError::Key("seed"))?;
        Ok(Self { mac })
    }

    /// The key of what stands beside an answer: the claim of who asks for it.
    pub(crate) fn beside(&self, kind: &str, key: &[u8; 32]) -> [u8; 32] {
        let mut mac = self.mac.clone();
        mac.update(kind.as_bytes());
        mac.update(key);
        mac.finalize().into_bytes().into()
    }

    /// The key of a question: its kind and its texts, in an order that is always the same.
    pub(crate) fn of(&self, kind: &str, texts: &[&str], asker: &Asker<'_>) -> [u8; 32] {
        let mut mac = self.mac.clone();
        let mut add = |text: &str| {
            // With its length before it, no text can reach into the next one's place.
            mac.update(&(text.len() as u64).to_be_bytes());
            mac.update(text.as_bytes());
        };
        add(RELEASE);
        add(kind);
        texts.iter().for_each(|text| add(text));
        match asker {
            Asker::Anonymous => add("anonymous"),
            Asker::Installation => add("installation"),
            Asker::Shows(own) => {
                add("own");
                own.iter().for_each(|text| add(text));
            }
        }
        mac.finalize().into_bytes().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_of_all_that_matters_and_equal_over_replicas() {
        let seed = OpenKey::new_seed().unwrap();
        let keys = Keys::new(&OpenKey::from_seed(seed.clone()).unwrap()).unwrap();
        let replica = Keys::new(&OpenKey::from_seed(seed).unwrap()).unwrap();
        let stranger = Keys::new(&OpenKey::from_seed(OpenKey::new_seed().unwrap()).unwrap()).unwrap();
        let user = |username| Asker::Shows(["password", username, "b"]);
        let key = keys.of("image", &["x", "y"], &user("a"));
        assert_eq!(key, replica.of("image", &["x", "y"], &user("a")));
        let others = [
            stranger.of("image", &["x", "y"], &user("a")),
            keys.of("commit", &["x", "y"], &user("a")),
            keys.of("image", &["xy", ""], &user("a")),
            keys.of("image", &["x", "y"], &user("c")),
            keys.of("image", &["x", "y"], &Asker::Shows(["identity token", "a", "b"])),
            keys.of("image", &["x", "y"], &Asker::Installation),
            keys.of("image", &["x", "y"], &Asker::Anonymous),
            keys.of("image", &["x", "y", "own", "password", "a", "b"], &Asker::Anonymous),
        ];
        assert!(!others.contains(&key));
    }
}
