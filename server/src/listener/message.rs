//! The time that a call's message has to come in. What a handler waits for afterwards is bounded there.

use std::time::Duration;

use concord_common::{ErrorCode, code::Refusal};
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use tokio::time::{Instant, timeout_at};
use tonic::{Status, body::Body};

use crate::metrics;

/// Calls that take a stream of messages: a transfer has bounds of its own, and reflection waits for questions.
const STREAMED: [&str; 3] = [
    "/concord.v1.FederationService/UploadContribution",
    "/concord.v1.WorkerService/PutObject",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
];

/// Gives the body of a call with one message until `limit` from now, and ends it with `TOO_SLOW` then.
pub(super) fn in_time(request: http::Request<Body>, limit: Duration) -> http::Request<Body> {
    if STREAMED.contains(&request.uri().path()) {
        return request;
    }
    let deadline = Instant::now() + limit;
    request.map(|body| {
        let frames = stream::try_unfold(body, move |mut body| async move {
            match timeout_at(deadline, body.frame()).await {
                Ok(None) => Ok(None),
                Ok(Some(frame)) => Ok(Some((frame?, body))),
                Err(_) => Err(too_slow(limit)),
            }
        });
        Body::new(StreamBody::new(frames))
    })
}

fn too_slow(limit: Duration) -> Status {
    let limit = humantime::format_duration(limit);
    let refusal = Refusal::new(
        ErrorCode::TooSlow,
        format!("the message was not there {limit} after the call's headers; call again"),
    );
    metrics::refusal(refusal.code);
    refusal.into()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, convert::Infallible};

    use bytes::Bytes;
    use futures::StreamExt as _;
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    /// A call whose body has so many bytes, of which one comes every ten seconds.
    fn trickled(path: &str, bytes: usize) -> http::Request<Body> {
        let pieces = stream::iter(0..bytes).then(|_| async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            Ok::<_, Infallible>(Bytes::from_static(b"x"))
        });
        let body = Body::new(axum::body::Body::from_stream(pieces));
        http::Request::post(path).body(body).unwrap()
    }

    async fn read(request: http::Request<Body>) -> Result<usize, Status> {
        let whole = in_time(request, LIMIT).into_body().collect().await?;
        Ok(whole.to_bytes().len())
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_trickles_in_is_ended_and_a_stream_of_them_is_not() {
        let unary = "/concord.v1.FederationService/ClaimLease";
        assert_eq!(read(trickled(unary, 2)).await.unwrap(), 2);
        let began = Instant::now();
        let status = read(trickled(unary, 1000)).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
        assert_eq!(began.elapsed().as_secs(), LIMIT.as_secs());
        let refusal = Refusal::from_status(&status).unwrap();
        assert_eq!(refusal.code, ErrorCode::TooSlow);
        for path in STREAMED {
            assert_eq!(read(trickled(path, 100)).await.unwrap(), 100);
        }
    }

    #[test]
    fn the_calls_without_this_bound_are_those_that_take_a_stream() {
        let reflection = tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET;
        let health = tonic_health::pb::FILE_DESCRIPTOR_SET;
        let mut streamed = BTreeSet::new();
        for set in [concord_proto::FILE_DESCRIPTOR_SET, health, reflection] {
            for file in FileDescriptorSet::decode(set).unwrap().file {
                for service in &file.service {
                    let calls = service.method.iter();
                    streamed.extend(calls.filter(|call| call.client_streaming()).map(|call| {
                        format!("/{}.{}/{}", file.package(), service.name(), call.name())
                    }));
                }
            }
        }
        assert_eq!(streamed, STREAMED.map(str::to_owned).into());
    }
}
