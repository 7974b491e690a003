//! Errors as people read them.

use std::error::Error;

/// An error with its causes, as `what: why: ..`. A cause that the text before it tells already is not told twice.
pub fn error_text(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Failed {
        #[error("cannot read x: {source}")]
        Telling { source: io::Error },
        #[error("cannot read x")]
        Silent { source: io::Error },
    }

    #[test]
    fn a_cause_is_told_once() {
        let source = || io::Error::from_raw_os_error(2);
        let wanted = "cannot read x: No such file or directory (os error 2)";
        assert_eq!(error_text(&Failed::Telling { source: source() }), wanted);
        assert_eq!(error_text(&Failed::Silent { source: source() }), wanted);
        assert_eq!(
            error_text(&source()),
            "No such file or directory (os error 2)"
        );
    }
}
