package workload

import (
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/renewd/renewd/cache"
)

// The answers that go to many streams at once are encoded by hand, from the cache
// straight into one pooled buffer, without a message that is copied. Field numbers
// are those of workload.proto.
const (
	responseSVIDs     = 1 // X509SVIDResponse
	responseFederated = 3
	svidID            = 1 // X509SVID
	svidChain         = 2
	svidKey           = 3
	svidBundle        = 4
	svidHint          = 5
	mapKey            = 1 // an entry of any map
	mapValue          = 2
)

var pool = mem.DefaultBufferPool()

// fieldSize is the size of a field with n bytes of content. All field numbers
// here are below 16: the tag is one byte.
func fieldSize(n int) int { return 1 + protowire.SizeBytes(n) }

func appendHeader(b []byte, field protowire.Number, n int) []byte {
	b = protowire.AppendTag(b, field, protowire.BytesType)
	return protowire.AppendVarint(b, uint64(n))
}

func appendField[T string | []byte](b []byte, field protowire.Number, v T) []byte {
	return append(appendHeader(b, field, len(v)), v...)
}

func (a *x509Answer) svidSize(id x509Identity) int {
	n := fieldSize(len(svidName(id.svid))) + fieldSize(len(id.svid.Leaf)+len(id.svid.Intermediates)) +
		fieldSize(len(id.svid.Key)) + fieldSize(len(a.own))
	if id.hint != "" {
		n += fieldSize(len(id.hint))
	}
	return n
}

func svidName(s *cache.SVID) string { return s.ID.String() }

// size is the exact size of the encoded answer in bytes.
func (a *x509Answer) size() int {
	n := 0
	for _, id := range a.identities {
		n += fieldSize(a.svidSize(id))
	}
	return n + bundlesSize(a.federated)
}

// encode returns the answer as an X509SVIDResponse of the given size. Its pooled
// buffer is free when it was written and its delivery is no longer tracked.
func (a *x509Answer) encode(size int) mem.Buffer {
	return fill(size, a.append)
}

func (a *x509Answer) append(b []byte) []byte {
	for _, id := range a.identities {
		b = appendHeader(b, responseSVIDs, a.svidSize(id))
		b = appendField(b, svidID, svidName(id.svid))
		b = appendHeader(b, svidChain, len(id.svid.Leaf)+len(id.svid.Intermediates))
		b = append(b, id.svid.Leaf...)
		b = append(b, id.svid.Intermediates...)
		b = appendField(b, svidKey, id.svid.Key)
		b = appendField(b, svidBundle, a.own)
		if id.hint != "" {
			b = appendField(b, svidHint, id.hint)
		}
	}
	return appendBundles(b, responseFederated, a.federated)
}

// bundlesSize is the size of a map from trust domains to bundles.
func bundlesSize(m []encodedBundle) int {
	n := 0
	for _, f := range m {
		n += fieldSize(fieldSize(len(f.td.IDString())) + fieldSize(len(f.data)))
	}
	return n
}

func appendBundles(b []byte, field protowire.Number, m []encodedBundle) []byte {
	for _, f := range m {
		name := f.td.IDString()
		b = appendHeader(b, field, fieldSize(len(name))+fieldSize(len(f.data)))
		b = appendField(b, mapKey, name)
		b = appendField(b, mapValue, f.data)
	}
	return b
}

// encodeBundles returns a message with a map of bundles only. Its pooled buffer is
// free when it was written.
func encodeBundles(field protowire.Number, m []encodedBundle) mem.Buffer {
	return fill(bundlesSize(m), func(b []byte) []byte { return appendBundles(b, field, m) })
}

// fill returns a pooled buffer of the given size, filled by with.
func fill(size int, with func([]byte) []byte) mem.Buffer {
	buf := pool.Get(size)
	*buf = with((*buf)[:0])
	return mem.NewBuffer(buf, pool)
}
