package workload

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// codec is gRPC's for protocol buffers, which in addition takes answers that
// are encoded already.
type codec struct{}

// encoded is an answer in wire format.
type encoded struct{ data mem.Buffer }

var protobuf = encoding.GetCodecV2(proto.Name)

// Marshal encodes an answer.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	if e, ok := v.(encoded); ok {
		return mem.BufferSlice{e.data}, nil
	}
	return protobuf.Marshal(v)
}

// Unmarshal decodes a request.
func (codec) Unmarshal(data mem.BufferSlice, v any) error { return protobuf.Unmarshal(data, v) }

// Name returns "proto".
func (codec) Name() string { return proto.Name }
