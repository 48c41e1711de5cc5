package spireapi

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// maxFields is the most fields of a request, each element of a list counted: far
// more than a batch of maxBatch has. An empty element takes two bytes to send and fifty
// to hold, so without it a request of 1 MiB could take 50 MiB.
const maxFields = 4096

// codec is gRPC's own for protocol buffers, which looks at a request before it is
// decoded.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	whole := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer whole.Free()
	if err := checkFields(whole.ReadOnlyData()); err != nil {
		return err
	}
	return c.CodecV2.Unmarshal(mem.BufferSlice{whole}, v)
}

// checkFields counts the fields of a message. None of a request has a list in a list.
func checkFields(message []byte) error {
	for n := 0; len(message) > 0; n++ {
		if n == maxFields {
			return fmt.Errorf("the request has more than %d fields: ask for less at a time", maxFields)
		}
		_, _, size := protowire.ConsumeField(message)
		if size < 0 {
			return protowire.ParseError(size)
		}
		message = message[size:]
	}
	return nil
}
