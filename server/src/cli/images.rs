//! The last images of an ArtAug job, of which its progress names the digests.

use std::{collections::BTreeSet, path::PathBuf};

use concord_common::{Digest, ErrorCode, code::Refusal};
use concord_proto::v1;
use futures::StreamExt as _;
use tonic::Status;

use super::{
    CliError,
    connect::Client,
    fetch::{Source, Wanted, in_time},
    output::Job,
    table,
};

/// Largest image that is brought, in bytes; a worker's are much smaller.
const MOST: u64 = 256 << 20;

/// The files for the last images that a job has made, the newest first.
pub(super) async fn last(client: &mut Client, job_id: &str) -> Result<Vec<Wanted>, CliError> {
    let request = v1::GetJobRequest {
        job_id: job_id.to_owned(),
    };
    let answer = client.get_job(request).await?.into_inner();
    let job = answer.job.unwrap_or_default();
    let progress = job.artaug.clone().unwrap_or_default();
    let shown = Job::from(job);
    if !table::is_artaug(&shown) {
        return Err(CliError::Refused(format!(
            "job {job_id} is of kind `{}`; only jobs of kind `artaug` make images",
            shown.kind
        )));
    }
    wanted(client, job_id, &progress.last_images).await
}

/// The same for digests that a server has named.
async fn wanted<S: Source>(
    source: &mut S,
    job_id: &str,
    digests: &[Vec<u8>],
) -> Result<Vec<Wanted>, CliError> {
    let mut seen = BTreeSet::new();
    let mut wanted = Vec::new();
    for bytes in digests {
        let digest = Digest::try_from(bytes.as_slice()).map_err(|error| {
            CliError::Untrusted(format!(
                "the server names an image of job {job_id} without a digest: {error}"
            ))
        })?;
        // Equal images are one file.
        if !seen.insert(digest) {
            continue;
        }
        let Some(bytes) = size(source, job_id, digest).await? else {
            continue;
        };
        let name = format!("{digest}.png");
        wanted.push(Wanted {
            path: PathBuf::from(&name),
            name,
            digest,
            bytes,
            replaces: false,
        });
    }
    if wanted.is_empty() {
        return Err(CliError::NotFound(format!(
            "job {job_id} has no last images: it has made none yet, or they were deleted; `concord job show {job_id}` says \
             how far it is"
        )));
    }
    Ok(wanted)
}

/// The size of an image; none if the job has no such object any more.
async fn size<S: Source>(
    source: &mut S,
    job_id: &str,
    digest: Digest,
) -> Result<Option<u64>, CliError> {
    let request = v1::GetArtefactRequest {
        job_id: job_id.to_owned(),
        digest: digest.to_vec(),
        offset: 0,
    };
    let first = match in_time(source.open(request)).await? {
        Ok(mut pieces) => in_time(pieces.next()).await?.transpose(),
        Err(status) => Err(status),
    };
    match first {
        Ok(Some(piece)) if piece.total > MOST => Err(CliError::Untrusted(format!(
            "the server says that the image {digest} has {} bytes; nothing of it was fetched",
            piece.total
        ))),
        Ok(piece) => Ok(Some(piece.map_or(0, |piece| piece.total))),
        Err(status) if is_unknown(&status) => Ok(None),
        Err(status) => Err(status.into()),
    }
}

fn is_unknown(status: &Status) -> bool {
    Refusal::from_status(status).is_some_and(|refusal| refusal.code == ErrorCode::UnknownObject)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures::stream::{self, Iter};

    use super::*;

    /// A server with one image, which it says has this size.
    struct Fake {
        image: Bytes,
        total: u64,
    }

    impl Source for Fake {
        type Pieces = Iter<std::vec::IntoIter<Result<v1::GetArtefactResponse, Status>>>;

        async fn open(&mut self, request: v1::GetArtefactRequest) -> Result<Self::Pieces, Status> {
            if request.digest != Digest::of(&self.image).to_vec() {
                let refusal = Refusal::new(ErrorCode::UnknownObject, "no such object");
                return Err(refusal.into());
            }
            let pieces = concord_common::chunk::chunks(&self.image, request.offset, 4)
                .map(|chunk| {
                    Ok(v1::GetArtefactResponse {
                        chunk: Some(chunk),
                        total: self.total,
                    })
                })
                .collect::<Vec<_>>();
            Ok(stream::iter(pieces))
        }
    }

    fn fake(total: u64) -> (Fake, Vec<u8>) {
        let image = Bytes::from_static(b"picture");
        let digest = Digest::of(&image).to_vec();
        (Fake { image, total }, digest)
    }

    #[tokio::test]
    async fn images_that_are_gone_are_left_out_and_equal_ones_are_one_file() {
        let (mut server, there) = fake(7);
        let gone = vec![0; 32];
        let digests = [there.clone(), gone.clone(), there.clone()];
        let found = wanted(&mut server, "job", &digests).await.unwrap();
        let [file] = &found[..] else {
            panic!("one file: {found:?}");
        };
        assert_eq!((file.digest.to_vec(), file.bytes), (there, 7));
        assert_eq!(file.path, PathBuf::from(format!("{}.png", file.digest)));
        for digests in [&[][..], &[gone]] {
            let error = wanted(&mut server, "job", digests).await.unwrap_err();
            assert!(matches!(error, CliError::NotFound(_)), "{error}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_an_image_is_not_fetched() {
        let (mut server, there) = fake(MOST + 1);
        for digest in [there, vec![1; 31]] {
            let error = wanted(&mut server, "job", &[digest]).await.unwrap_err();
            assert!(matches!(error, CliError::Untrusted(_)), "{error}");
        }
    }
}
