//! Reads files that somebody else wrote, and no further than makes sense.
//! Knows no format.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::error::{Error, Result};

/// All of a plain file. `what` it should be, such as `a policy`, is said of one that is longer
/// than `most` bytes.
///
/// A file may grow while it is read, so its size is capped by the reading.
pub fn read_capped(path: &Path, most: u64, what: &str) -> Result<Vec<u8>> {
    let unreadable = |error: std::io::Error| {
        let remedy = match error.kind() {
            ErrorKind::PermissionDenied => "; let the server read it",
            _ => "",
        };
        Error::file(path.display(), format!("{error}{remedy}"))
    };
    let metadata = fs::metadata(path).map_err(unreadable)?;
    // Opening a pipe would wait for its writer, and a device may have no end.
    if !metadata.is_file() {
        let message = format!("is not a plain file; expected {what}");
        return Err(Error::file(path.display(), message));
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(unreadable)?;
    file.take(most.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > most {
        let message = format!("is larger than {most} bytes: not {what}");
        return Err(Error::file(path.display(), message));
    }
    Ok(bytes)
}

/// The same for text.
pub fn read_text(path: &Path, most: u64, what: &str) -> Result<String> {
    String::from_utf8(read_capped(path, most, what)?)
        .map_err(|_| Error::file(path.display(), "is not UTF-8; save it as UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_the_cap_and_not_beyond() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.toml");
        fs::write(&path, "12345").expect("written");
        assert_eq!(read_text(&path, 5, "a policy"), Ok("12345".into()));
        let error = read_text(&path, 4, "a policy").expect_err("too long");
        assert!(error.to_string().ends_with("not a policy"), "{error}");
        fs::write(&path, [0xff]).expect("written");
        assert!(read_text(&path, 5, "a policy").is_err());
    }

    #[test]
    fn what_is_no_plain_file_is_refused_unread() {
        for path in ["/dev/zero", "/", "/nowhere"] {
            let error = read_capped(Path::new(path), 5, "a policy").expect_err(path);
            assert!(error.to_string().starts_with(path), "{error}");
        }
    }
}
