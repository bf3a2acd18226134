//! Streams of server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use mach_session::ReplyUpdate;
use serde_json::Value;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::Instant;

use crate::error::ApiError;
use crate::generate::{Job, Kind, Running, Totals, finish_reason};
use crate::wire;

/// Events that may wait for a slow client before its generation's events wait instead.
const WAITING: usize = 64;

/// The receiving end as a response body. When the client goes away the body is dropped, and the sending task sees it.
struct Events(Receiver<Bytes>);

impl Stream for Events {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|bytes| bytes.map(Ok))
    }
}

/// The client is gone.
struct Gone;

/// Sends events, and comments while there is nothing to send.
struct Writer {
    tx: Sender<Bytes>,
    keep_alive: Duration,
}

impl Writer {
    async fn raw(&self, text: String) -> Result<(), Gone> {
        self.tx.send(Bytes::from(text)).await.map_err(|_| Gone)
    }

    async fn data(&self, value: &Value) -> Result<(), Gone> {
        self.raw(format!("data: {value}\n\n")).await
    }
}

/// Answers a job as a stream. Its first choice is already queued, so that a full queue is still an ordinary error.
pub(crate) fn stream(job: Job, first: Running, keep_alive: Duration) -> Response {
    let (tx, rx) = channel(WAITING);
    let writer = Writer { tx, keep_alive };
    tokio::spawn(async move {
        // Gone: the guard in `Running` was dropped with it, which cancels the computation.
        let _ = send_all(&job, first, &writer).await;
    });
    let mut response = Body::from_stream(Events(rx)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

async fn send_all(job: &Job, first: Running, writer: &Writer) -> Result<(), Gone> {
    let mut totals = Totals::default();
    let mut first = Some(first);
    for index in 0..job.choices() {
        let running = match first.take() {
            Some(running) => Ok(running),
            None => job.start(index),
        };
        let sent = match running {
            Ok(running) => send_choice(job, index, running, &mut totals, writer).await?,
            Err(e) => Err(e),
        };
        if let Err(e) = sent {
            // The status is long sent: the error is an event, and the stream ends without the closing mark.
            return writer.data(&e.body()).await;
        }
    }
    if job.common.include_usage {
        writer.data(&wire::usage_chunk(job, &totals)).await?;
    }
    writer.raw("data: [DONE]\n\n".to_owned()).await
}

async fn send_choice(job: &Job, index: usize, mut running: Running, totals: &mut Totals, writer: &Writer) -> Result<Result<(), ApiError>, Gone> {
    let (mut prefilled, mut prompt) = (0, 0);
    // Counted from the last byte sent: progress of a long prefill is not heard by the client.
    let mut silent_until = Instant::now() + writer.keep_alive;
    let mut role_sent = job.kind == Kind::Completion;
    loop {
        let event = tokio::select! {
            event = running.events.recv() => event,
            () = writer.tx.closed() => return Err(Gone),
            () = tokio::time::sleep_until(silent_until) => {
                writer.raw(format!(": keepalive {prefilled}/{prompt}\n\n")).await?;
                silent_until = Instant::now() + writer.keep_alive;
                continue;
            }
        };
        match event {
            Some(ReplyUpdate::Prefill { done, total, .. }) => (prefilled, prompt) = (done, total),
            Some(ReplyUpdate::Parts(parts)) => {
                if !std::mem::replace(&mut role_sent, true) {
                    writer.data(&wire::role_chunk(job, index)).await?;
                }
                for chunk in parts.iter().filter_map(|part| wire::part_chunk(job, index, part)) {
                    writer.data(&chunk).await?;
                    silent_until = Instant::now() + writer.keep_alive;
                }
            }
            Some(ReplyUpdate::Finished { parts, reason, calls, reasoning_tokens, receipt }) => {
                if !role_sent {
                    writer.data(&wire::role_chunk(job, index)).await?;
                }
                for chunk in parts.iter().filter_map(|part| wire::part_chunk(job, index, part)) {
                    writer.data(&chunk).await?;
                }
                totals.add(&receipt, reasoning_tokens, job.is_first(index));
                writer.data(&wire::finish_chunk(job, index, finish_reason(reason, calls), totals)).await?;
                return Ok(Ok(()));
            }
            Some(ReplyUpdate::Failed { code, message }) => return Ok(Err(ApiError::failed(code, message))),
            None => return Ok(Err(ApiError::closed())),
        }
    }
}
