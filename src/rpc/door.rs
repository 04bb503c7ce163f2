//! Who may come in: connections up to a limit, and none that keeps its place in silence.
//! Knows sockets and clocks; what is said over them is for others to read.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{self, Stream};
use rustix::process::{Resource, getrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// What every HTTP/2 connection begins with.
const PREFACE_BYTES: usize = 24;
/// Where no connection can be taken, asking again at once would only burn a core.
const PAUSE: Duration = Duration::from_millis(100);

/// How many connections there may be at once, and how long a peer may take to say what it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub grpc_connections: usize,
    pub http_connections: usize,
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            grpc_connections: 1024,
            http_connections: 64,
            patience: Duration::from_secs(10),
        }
    }
}

/// A listener that takes a connection only while there is room for one; others wait unaccepted.
pub struct Door {
    listener: TcpListener,
    places: Arc<Semaphore>,
    patience: Duration,
    /// Bytes that a peer must send before its time is up.
    due: usize,
}

impl Door {
    /// For gRPC: a peer must send the preface of HTTP/2 in time; then keepalive watches it.
    pub fn for_grpc(listener: TcpListener, limits: Limits) -> Self {
        let places = affordable("gRPC", limits.grpc_connections, 2);
        Self::new(listener, places, limits.patience, PREFACE_BYTES)
    }

    /// For HTTP with one request a connection: all of it must be over in time.
    pub fn for_http(listener: TcpListener, limits: Limits) -> Self {
        let places = affordable("HTTP", limits.http_connections, 8);
        Self::new(listener, places, limits.patience, usize::MAX)
    }

    fn new(listener: TcpListener, places: usize, patience: Duration, due: usize) -> Self {
        Self {
            listener,
            places: Arc::new(Semaphore::new(places.min(Semaphore::MAX_PERMITS))),
            patience,
            due,
        }
    }

    /// The next connection that there is room for.
    async fn next(&mut self) -> (Guest, SocketAddr) {
        let place = Arc::clone(&self.places).acquire_owned().await;
        let place = place.expect("nobody closes the door's semaphore");
        let mut told = false;
        loop {
            match self.listener.accept().await {
                Ok((socket, address)) => {
                    // A peer that is gone already is found out by the first read.
                    let _ = socket.set_nodelay(true);
                    let guest = Guest {
                        socket,
                        late: Some(Box::pin(tokio::time::sleep(self.patience))),
                        due: self.due,
                        _place: place,
                    };
                    return (guest, address);
                }
                // The peer's doing; the next one is not kept waiting for it.
                Err(error) if is_of_the_peer(&error) => {}
                Err(error) => {
                    if !told {
                        tracing::warn!(%error, "a connection cannot be taken; trying again");
                        told = true;
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Every connection, without end.
    pub(super) fn into_stream(self) -> impl Stream<Item = io::Result<Guest>> {
        stream::unfold(self, |mut door| async move {
            let (guest, _) = door.next().await;
            Some((Ok(guest), door))
        })
    }
}

impl axum::serve::Listener for Door {
    type Io = Guest;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guest, SocketAddr) {
        self.next().await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// `asked`, or the share of the process's descriptors that leaves enough for the rest.
fn affordable(what: &str, asked: usize, share: u64) -> usize {
    let Some(descriptors) = getrlimit(Resource::Nofile).current else {
        return asked;
    };
    let most = usize::try_from(descriptors / share).map_or(usize::MAX, |most| most.max(1));
    if most < asked {
        tracing::warn!(
            asked,
            connections = most,
            descriptors,
            "the limit of open files (ulimit -n) allows fewer {what} connections"
        );
    }
    asked.min(most)
}

fn is_of_the_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
    )
}

/// A connection, with its place and the time that it has to begin.
pub struct Guest {
    socket: TcpStream,
    /// None once nothing is due any more.
    late: Option<Pin<Box<Sleep>>>,
    due: usize,
    _place: OwnedSemaphorePermit,
}

impl Guest {
    fn in_time(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(late) = &mut self.late else {
            return Ok(());
        };
        match late.as_mut().poll(context) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the peer took too long to say what it wants",
            )),
        }
    }

    fn heard(&mut self, bytes: usize) {
        self.due = self.due.saturating_sub(bytes);
        if self.due == 0 {
            self.late = None;
        }
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let guest = self.get_mut();
        guest.in_time(context)?;
        let before = buffer.filled().len();
        let read = Pin::new(&mut guest.socket).poll_read(context, buffer);
        guest.heard(buffer.filled().len() - before);
        read
    }
}

impl AsyncWrite for Guest {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let guest = self.get_mut();
        guest.in_time(context)?;
        Pin::new(&mut guest.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let guest = self.get_mut();
        guest.in_time(context)?;
        Pin::new(&mut guest.socket).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(context)
    }
}

impl Connected for Guest {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.socket.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn limits(connections: usize, patience: Duration) -> Limits {
        Limits {
            grpc_connections: connections,
            http_connections: connections,
            patience,
        }
    }

    async fn door(open: fn(TcpListener, Limits) -> Door, limits: Limits) -> (Door, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = listener.local_addr().expect("an address");
        (open(listener, limits), address)
    }

    #[tokio::test]
    async fn a_peer_has_its_time_until_the_preface_is_there() {
        let patience = Duration::from_millis(50);
        let (mut door, address) = door(Door::for_grpc, limits(9, patience)).await;
        let mut spoke = TcpStream::connect(address).await.expect("connects");
        let (mut spoken, _) = door.next().await;
        let half = TcpStream::connect(address).await.expect("connects");
        let (mut halved, _) = door.next().await;
        spoke.write_all(&[7; PREFACE_BYTES]).await.expect("sends");
        half.try_write(&[7; PREFACE_BYTES - 1]).expect("sends");

        let mut bytes = [0; 64];
        spoken.read_exact(&mut bytes[..24]).await.expect("reads");
        halved.read_exact(&mut bytes[..23]).await.expect("reads");
        let error = halved.read(&mut bytes).await.expect_err("too late");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // Long after its time the one that spoke is still heard.
        spoke.write_all(b"more").await.expect("sends");
        assert_eq!(spoken.read(&mut bytes).await.expect("reads"), 4);
    }

    #[tokio::test]
    async fn a_request_over_http_must_be_over_in_time() {
        let patience = Duration::from_millis(50);
        let (mut door, address) = door(Door::for_http, limits(9, patience)).await;
        let mut peer = TcpStream::connect(address).await.expect("connects");
        let (mut guest, _) = door.next().await;
        let request = b"GET /health HTTP/1.1\r\nx-long: ";
        peer.write_all(request).await.expect("sends");
        let mut bytes = [0; 64];
        assert_eq!(guest.read(&mut bytes).await.expect("reads"), request.len());
        assert!(guest.read(&mut bytes).await.is_err());
        assert!(guest.write(b"HTTP/1.1 200 OK").await.is_err());
    }

    #[tokio::test]
    async fn one_connection_more_than_there_is_room_for_waits_for_a_place() {
        let (mut door, address) = door(Door::for_grpc, limits(1, Duration::from_secs(60))).await;
        let _first = TcpStream::connect(address).await.expect("connects");
        let (guest, _) = door.next().await;
        let _second = TcpStream::connect(address).await.expect("connects");
        let soon = tokio::time::timeout(Duration::from_millis(30), door.next()).await;
        assert!(soon.is_err(), "there was room for two");
        drop(guest);
        door.next().await;
    }
}
