//! Sealing of secrets (nkeys xkeys: X25519 and XSalsa20-Poly1305). Whoever knows the installation's public key can
//! seal; only who has the seed can open.

use hmac::{Hmac, KeyInit as _, Mac as _};
use nkeys::XKey;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;

/// The installation's public key: what a gateway needs.
#[derive(Clone)]
pub struct SealKey {
    public: String,
}

/// The installation's key pair: what resolver, orchestrator and log-relay need.
#[derive(Clone)]
pub struct OpenKey {
    seed: SecretString,
    public: String,
}

/// Something is wrong with a key or a sealed message. Says nothing of the content.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SealError {
    #[error("the seal key is not a valid xkey {0}")]
    Key(&'static str),
    #[error("the secrets can't be sealed")]
    Seal,
    #[error("the secrets can't be opened: they were sealed for another key, or are damaged")]
    Open,
}

impl SealKey {
    /// `public` is an xkey's public form, `X…`.
    pub fn from_public(public: &str) -> Result<Self, SealError> {
        XKey::from_public_key(public).map_err(|_| SealError::Key("public key"))?;
        Ok(Self { public: public.to_owned() })
    }

    pub fn public(&self) -> &str {
        &self.public
    }

    /// Seals with a sender's key of this one message, which stands before it.
    pub fn seal(&self, content: &[u8]) -> Result<Vec<u8>, SealError> {
        let recipient = XKey::from_public_key(&self.public).map_err(|_| SealError::Key("public key"))?;
        let sender = XKey::new();
        let sealed = sender.seal(content, &recipient).map_err(|_| SealError::Seal)?;
        let mut message = sender.public_key().into_bytes();
        message.push(b'.');
        message.extend(sealed);
        Ok(message)
    }
}

impl OpenKey {
    /// A new pair's seed, to be kept.
    pub fn new_seed() -> Result<SecretString, SealError> {
        XKey::new().seed().map(SecretString::from).map_err(|_| SealError::Key("seed"))
    }

    pub fn from_seed(seed: SecretString) -> Result<Self, SealError> {
        let key = XKey::from_seed(seed.expose_secret().trim()).map_err(|_| SealError::Key("seed"))?;
        let public = key.public_key();
        Ok(Self { seed: seed.expose_secret().trim().to_owned().into(), public })
    }

    /// The public half.
    pub fn seal_key(&self) -> SealKey {
        SealKey { public: self.public.clone() }
    }

    pub fn public(&self) -> &str {
        &self.public
    }

    /// A key for another purpose, equal in every process that has this seed. It tells nothing of the seed.
    pub fn derive(&self, purpose: &str) -> Result<[u8; 32], SealError> {
        let mac = Hmac::<Sha256>::new_from_slice(self.seed.expose_secret().as_bytes());
        let mac = mac.map_err(|_| SealError::Key("seed"))?;
        Ok(mac.chain_update(purpose).finalize().into_bytes().into())
    }

    pub fn open(&self, message: &[u8]) -> Result<Vec<u8>, SealError> {
        let dot = message.iter().position(|byte| *byte == b'.').ok_or(SealError::Open)?;
        let (sender, sealed) = message.split_at_checked(dot).ok_or(SealError::Open)?;
        let sealed = sealed.get(1..).ok_or(SealError::Open)?;
        let sender = std::str::from_utf8(sender).map_err(|_| SealError::Open)?;
        let sender = XKey::from_public_key(sender).map_err(|_| SealError::Open)?;
        let key = XKey::from_seed(self.seed.expose_secret()).map_err(|_| SealError::Key("seed"))?;
        key.open(sealed, &sender).map_err(|_| SealError::Open)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn only_the_key_opens_and_nothing_shows(content in proptest::collection::vec(any::<u8>(), 8..200), flip in 0usize..1000) {
            let key = OpenKey::from_seed(OpenKey::new_seed().unwrap()).unwrap();
            let other = OpenKey::from_seed(OpenKey::new_seed().unwrap()).unwrap();
            let mut sealed = key.seal_key().seal(&content).unwrap();
            prop_assert_eq!(key.open(&sealed).unwrap(), content.clone());
            prop_assert!(other.open(&sealed).is_err());
            prop_assert!(!sealed.windows(content.len()).any(|window| window == content));
            let at = flip % sealed.len();
            sealed[at] ^= 1;
            prop_assert!(key.open(&sealed).is_err());
        }

        #[test]
        fn no_input_panics(message in proptest::collection::vec(any::<u8>(), 0..100)) {
            let key = OpenKey::from_seed(OpenKey::new_seed().unwrap()).unwrap();
            prop_assert!(key.open(&message).is_err());
        }
    }
}
