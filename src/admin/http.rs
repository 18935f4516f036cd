//! The endpoint itself.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use millrace_config::Code;
use millrace_connect::clock::now_us;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::caller::{Ends, refusal};
use super::metrics::refresh;
use super::{Board, Live};

/// The media type of Prometheus' text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Somebody who wants the configuration to be read again, and waits for what came of it.
pub(crate) type Asked = oneshot::Sender<Reloaded>;

/// What came of reading the configuration again: what `POST /reload` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub(crate) enum Reloaded {
    /// The process works by it now.
    Applied {
        /// What has changed.
        changed: String,
        /// The parts that began anew, are new, or are gone, as `--only` names them.
        #[serde(default)]
        parts: Vec<String>,
        /// The parts that are configured and that this process does not have.
        #[serde(default)]
        elsewhere: Vec<String>,
        /// What could not be looked at before, a line each.
        #[serde(default)]
        unchecked: Vec<String>,
        /// What only a restart changes.
        needs_restart: Option<String>,
    },
    /// It is wrong; the process works by the old one.
    Invalid {
        /// Every mistake, a line each.
        errors: String,
    },
    /// It is right, and this process cannot take it; it works by the old one.
    Refused {
        /// Why.
        reason: String,
        /// The code of what a server said to it, where that is why.
        #[serde(default)]
        code: Option<String>,
        /// What helps against that.
        #[serde(default)]
        remedy: Option<String>,
    },
    /// Whoever asked may not.
    Forbidden {
        /// Why.
        reason: String,
    },
    /// The process ends, and reads nothing again.
    Ending,
}

#[derive(Clone)]
struct Shared {
    board: Arc<Board>,
    metrics: PrometheusHandle,
    reloads: mpsc::Sender<Asked>,
}

/// Takes the address. Where another process has it this one goes on without an endpoint, and says so: a
/// capture that only stands by must not fail for it.
///
/// # Errors
/// The address cannot be used for another reason.
pub(crate) async fn bind(listen: SocketAddr) -> io::Result<Option<TcpListener>> {
    match TcpListener::bind(listen).await {
        Ok(listener) => {
            let address = listener.local_addr()?;
            tracing::info!(%address, "admin listening");
            Ok(Some(listener))
        }
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let code = Code::AdminPortInUse;
            tracing::warn!(address = %listen, %code, "{}: going on without the endpoint", code.title());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Answers until it is told to stop.
///
/// # Errors
/// The listener failed.
pub(crate) async fn serve(
    listener: TcpListener,
    board: Arc<Board>,
    metrics: PrometheusHandle,
    reloads: mpsc::Sender<Asked>,
    stop: CancellationToken,
) -> io::Result<()> {
    let router = router(Shared {
        board,
        metrics,
        reloads,
    });
    let service = router.into_make_service_with_connect_info::<Ends>();
    // A scraper that holds its connection open must not hold up the end of the process.
    let serving = async { axum::serve(listener, service).await };
    stop.run_until_cancelled(serving).await.unwrap_or(Ok(()))
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/reload", post(reload))
        .with_state(shared)
}

async fn livez(State(shared): State<Shared>) -> Response {
    if shared.board.is_live() {
        (StatusCode::OK, "ok\n").into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the process is stuck\n").into_response()
    }
}

async fn readyz(State(shared): State<Shared>) -> Response {
    let ready = shared.board.is_ready();
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(shared.board.live(now_us()).overall)).into_response()
}

async fn metrics(State(shared): State<Shared>) -> Response {
    refresh(&shared.board);
    (
        [(header::CONTENT_TYPE, TEXT_FORMAT)],
        shared.metrics.render(),
    )
        .into_response()
}

async fn status(State(shared): State<Shared>) -> Json<Live> {
    Json(shared.board.live(now_us()))
}

/// It changes what the process does, so it is not for everybody who reaches the address: see [`refusal`].
async fn reload(
    State(shared): State<Shared>,
    ConnectInfo(ends): ConnectInfo<Ends>,
    headers: HeaderMap,
) -> Response {
    let reloaded = match refusal(ends, &headers) {
        Some(reason) => Reloaded::Forbidden {
            reason: reason.to_owned(),
        },
        None => ask(&shared.reloads).await.unwrap_or(Reloaded::Ending),
    };
    let status = match reloaded {
        Reloaded::Applied { .. } => StatusCode::OK,
        Reloaded::Invalid { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        Reloaded::Refused { .. } => StatusCode::CONFLICT,
        Reloaded::Forbidden { .. } => StatusCode::FORBIDDEN,
        Reloaded::Ending => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(reloaded)).into_response()
}

/// Asks for a reload; when the process ends before it answers: `None`.
async fn ask(reloads: &mpsc::Sender<Asked>) -> Option<Reloaded> {
    let (asked, answer) = oneshot::channel();
    reloads.send(asked).await.ok()?;
    answer.await.ok()
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;
    use millrace_config::State as Phase;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    }

    #[tokio::test]
    async fn health_follows_the_board() {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .expect("bound")
            .expect("free");
        let address = listener.local_addr().expect("bound");
        let board = Arc::new(Board::new("shop", true, Vec::new()));
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let stop = CancellationToken::new();
        let (reloads, _asked) = mpsc::channel(1);
        let serving = serve(listener, Arc::clone(&board), metrics, reloads, stop.clone());
        let serving = tokio::spawn(serving);

        assert!(bind(address).await.expect("a warning only").is_none());
        assert!(ask(address, "/livez").await.starts_with("HTTP/1.0 200"));
        let answer = ask(address, "/readyz").await;
        assert!(
            answer.starts_with("HTTP/1.0 503") && answer.contains("\"state\":\"starting\""),
            "{answer}"
        );
        board.set_capture(Phase::Streaming);
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.0 200"));
        assert!(
            ask(address, "/metrics")
                .await
                .contains("text/plain; version=0.0.4")
        );
        assert!(ask(address, "/status").await.contains("\"name\":\"shop\""));

        stop.cancel();
        serving.await.expect("joined").expect("stopped");
    }

    #[tokio::test]
    async fn a_web_page_does_not_reload_and_one_that_comes_too_late_is_told() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = bind(any).await.expect("bound").expect("free");
        let address = listener.local_addr().expect("bound");
        let board = Arc::new(Board::new("shop", true, Vec::new()));
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let stop = CancellationToken::new();
        let (reloads, mut asked) = mpsc::channel::<Asked>(1);
        let serving = tokio::spawn(serve(listener, board, metrics, reloads, stop.clone()));
        let post = async |line: &str| {
            let mut stream = TcpStream::connect(address).await.expect("connected");
            let request = format!("POST /reload HTTP/1.0\r\nHost: {address}\r\n{line}\r\n");
            stream.write_all(request.as_bytes()).await.expect("written");
            let mut answer = String::new();
            let soon = std::time::Duration::from_secs(5);
            let read = tokio::time::timeout(soon, stream.read_to_string(&mut answer)).await;
            read.expect("an answer").expect("read");
            answer
        };
        for line in [
            "Origin: http://127.0.0.1:9400\r\n",
            "Host: rebound.example\r\n",
        ] {
            let answer = post(line).await;
            assert!(answer.starts_with("HTTP/1.0 403"), "{answer}");
            assert!(answer.contains("\"result\":\"forbidden\""), "{answer}");
        }
        assert!(asked.try_recv().is_err(), "nobody was asked");
        // The process ends: what was taken is not answered, and nothing more is taken.
        let (early, ()) = tokio::join!(post(""), async {
            drop(asked.recv().await.expect("asked"));
            asked.close();
        });
        for answer in [early, post("").await] {
            assert!(answer.starts_with("HTTP/1.0 503"), "{answer}");
            assert!(answer.contains("\"result\":\"ending\""), "{answer}");
        }
        stop.cancel();
        serving.await.expect("joined").expect("stopped");
    }
}
