package spireapi

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// maxFields is the most fields in a request, each element of a list counted. A
// batch of maxBatch has far fewer. An empty element takes two bytes in a request
// and fifty in memory, so without the bound a request of 1 MiB could take 50 MiB.
const maxFields = 4096

// codec is gRPC's codec for protocol buffers. It checks the number of fields of a
// request before decoding it.
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

// checkFields counts the top-level fields of a message: no request of the served
// APIs has a list within a list.
func checkFields(message []byte) error {
	for n := 0; len(message) > 0; n++ {
		if n == maxFields {
			return fmt.Errorf("request has more than %d fields: ask for less at a time", maxFields)
		}
		_, _, size := protowire.ConsumeField(message)
		if size < 0 {
			return protowire.ParseError(size)
		}
		message = message[size:]
	}
	return nil
}
