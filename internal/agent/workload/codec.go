package workload

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// codec is gRPC's codec for protocol buffers that also accepts encoded answers.
type codec struct{}

// encodedMessage is an answer in wire format.
type encodedMessage struct{ data mem.Buffer }

var protobuf = encoding.GetCodecV2(proto.Name)

// Marshal encodes an answer, or returns an encodedMessage as it is.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	if e, ok := v.(encodedMessage); ok {
		return mem.BufferSlice{e.data}, nil
	}
	return protobuf.Marshal(v)
}

// Unmarshal decodes a request.
func (codec) Unmarshal(data mem.BufferSlice, v any) error { return protobuf.Unmarshal(data, v) }

// Name returns "proto".
func (codec) Name() string { return proto.Name }
