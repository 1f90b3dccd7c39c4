//! A scripted server over every transport.

pub(crate) mod script;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::Request;
use ostler_client::body::Body;
use ostler_client::{Ca, Client, Credentials, LocalService, Target};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
pub(crate) use script::{Answer, Seen, operation_of, vm};
use script::{State, answer, serve};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;

pub(crate) struct Server {
    state: Arc<State>,
    target: Target,
    _dir: Option<tempfile::TempDir>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Server {
    pub(crate) fn unix(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Self::unix_at(&dir.path().join("s.sock"), script);
        server._dir = Some(dir);
        server
    }

    pub(crate) fn unix_at(path: &Path, script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let state = State::new(script);
        let listener = UnixListener::bind(path).unwrap();
        let served = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(served.clone(), stream));
            }
        });
        Self { state, target: Target::Unix(path.to_owned()), _dir: None, task: Some(task) }
    }

    pub(crate) async fn tcp(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let state = State::new(script);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let served = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(served.clone(), stream));
            }
        });
        Self { state, target, _dir: None, task: Some(task) }
    }

    pub(crate) async fn tls(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let signed = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(signed.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![signed.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let state = State::new(script);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target: Target = format!("https://{}", listener.local_addr().unwrap()).parse().unwrap();
        let target = target.with_ca(Ca::Pem(signed.cert.pem().into_bytes()));
        let served = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, served) = (acceptor.clone(), served.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        serve(served, stream).await;
                    }
                });
            }
        });
        Self { state, target, _dir: None, task: Some(task) }
    }

    pub(crate) fn local(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let state = State::new(script);
        let served = state.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let served = served.clone();
            async move { answer(&served, request).await }
        });
        Self { state, target: Target::Local(LocalService::new(service)), _dir: None, task: None }
    }

    pub(crate) fn target(&self) -> Target {
        self.target.clone()
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.target(), Credentials::none()).unwrap()
    }

    pub(crate) fn ca(&self) -> Ca {
        match self.target() {
            Target::Https { ca, .. } => ca,
            other => panic!("{other} has none"),
        }
    }

    pub(crate) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    pub(crate) fn requests(&self) -> usize {
        self.state.headers.lock().unwrap().len()
    }

    pub(crate) fn headers(&self, name: &str) -> Vec<String> {
        let headers = self.state.headers.lock().unwrap();
        headers.iter().filter_map(|h| Some(h.get(name)?.to_str().unwrap().to_owned())).collect()
    }
}
