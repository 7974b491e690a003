//! Several byte strings in one object, by name: a safetensors file of bytes, which is checked when it is read. Equal contents give equal bytes.

use std::collections::{BTreeMap, HashMap};

use concord_artaug::engine::EngineError;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

/// Key of what a container is, in its metadata.
const KEY: &str = "concord";

/// What an object of a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// One `LoRA`, or one for every pair.
    Lora,
    /// A fit under way.
    Fit,
}

impl What {
    fn label(self) -> &'static str {
        match self {
            Self::Lora => "artaug lora 1",
            Self::Fit => "artaug fit 2",
        }
    }
}

/// Byte strings by name.
pub(super) type Sections = BTreeMap<String, Vec<u8>>;

/// Puts sections into one object.
pub(super) fn pack<B: AsRef<[u8]>>(
    what: What,
    sections: &BTreeMap<String, B>,
) -> Result<Vec<u8>, EngineError> {
    let failed = |error: safetensors::SafeTensorError| {
        EngineError::Failed(format!("{}: {error}", what.label()))
    };
    let views = sections
        .iter()
        .map(|(name, bytes)| {
            let bytes = bytes.as_ref();
            let view = TensorView::new(Dtype::U8, vec![bytes.len()], bytes).map_err(failed)?;
            Ok((name.as_str(), view))
        })
        .collect::<Result<Vec<_>, EngineError>>()?;
    let label = HashMap::from([(KEY.to_owned(), what.label().to_owned())]);
    safetensors::serialize(views, Some(label)).map_err(failed)
}

/// The reverse of [`pack`]: nothing in the bytes is taken on trust.
pub(super) fn unpack(what: What, bytes: &[u8]) -> Result<Sections, EngineError> {
    let complain = |reason: String| {
        EngineError::Unusable(format!("an object that is no {:?}: {reason}", what.label()))
    };
    let (_, header) =
        SafeTensors::read_metadata(bytes).map_err(|error| complain(error.to_string()))?;
    let label = header
        .metadata()
        .as_ref()
        .and_then(|entries| entries.get(KEY));
    if label.map(String::as_str) != Some(what.label()) {
        return Err(complain(format!("it says {label:?}")));
    }
    let file = SafeTensors::deserialize(bytes).map_err(|error| complain(error.to_string()))?;
    file.iter()
        .map(|(name, view)| {
            if view.dtype() != Dtype::U8 {
                return Err(complain(format!("section {name:?} is not of bytes")));
            }
            Ok((name.to_owned(), view.data().to_vec()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sections_survive_and_equal_contents_give_equal_bytes() {
        let sections = Sections::from([
            ("a".to_owned(), vec![1, 2, 3]),
            ("empty".to_owned(), Vec::new()),
            ("z".to_owned(), vec![0; 1000]),
        ]);
        let bytes = pack(What::Fit, &sections).unwrap();
        assert_eq!(unpack(What::Fit, &bytes).unwrap(), sections);
        assert_eq!(pack(What::Fit, &sections).unwrap(), bytes);
        let refusal = unpack(What::Lora, &bytes).unwrap_err().to_string();
        assert!(refusal.contains("artaug fit 2"), "{refusal}");
    }

    proptest! {
        #[test]
        fn damaged_objects_are_an_error_or_sections(
            place in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>(),
        ) {
            let sections = Sections::from([("a".to_owned(), vec![7; 30]), ("b".to_owned(), vec![8; 9])]);
            let mut bytes = pack(What::Lora, &sections).unwrap();
            let place = place.index(bytes.len());
            if cut {
                bytes.truncate(place);
            } else {
                bytes[place] = byte;
            }
            match unpack(What::Lora, &bytes) {
                Ok(found) => prop_assert!(!cut && found.len() <= 2),
                Err(error) => prop_assert!(matches!(error, EngineError::Unusable(_))),
            }
        }
    }
}
