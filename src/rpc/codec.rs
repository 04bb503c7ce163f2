//! Protobuf on the wire, as tonic-prost does it, except that bytes nobody can read are the caller's fault.
//! Knows no message.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec as TonicCodec, DecodeBuf, Decoder as TonicDecoder};
use tonic::{Code, Status};
use tonic_prost::{ProstDecoder, ProstEncoder};

use super::status::unreadable;

pub struct Codec<Sent, Read>(PhantomData<(Sent, Read)>);

impl<Sent, Read> Default for Codec<Sent, Read> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<Sent, Read> TonicCodec for Codec<Sent, Read>
where
    Sent: Message + Send + 'static,
    Read: Message + Default + Send + 'static,
{
    type Encode = Sent;
    type Decode = Read;
    type Encoder = ProstEncoder<Sent>;
    type Decoder = Decoder<Read>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::default())
    }

    fn decoder(&mut self) -> Self::Decoder {
        Decoder(ProstDecoder::new(BufferSettings::default()))
    }
}

pub struct Decoder<Read>(ProstDecoder<Read>);

impl<Read: Message + Default> TonicDecoder for Decoder<Read> {
    type Item = Read;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Read>, Status> {
        self.0.decode(buffer).map_err(|status| match status.code() {
            // What tonic-prost answers to a decode error, which would read as a bug of ours.
            Code::Internal => unreadable(status.message()),
            _ => status,
        })
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}
