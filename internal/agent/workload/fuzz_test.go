package workload

import (
	"bytes"
	"context"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/cache"
)

// FuzzEncode compares the encoding by hand with that of the protobuf library.
func FuzzEncode(f *testing.F) {
	f.Add("e", "hint", []byte("leaf"), []byte("more"), []byte("key"), []byte("bundle"), "other.example", []byte("foreign"), uint8(3))
	f.Add("", "", []byte{}, []byte{}, []byte{}, []byte{}, "", []byte{}, uint8(1))
	f.Add("e", "", bytes.Repeat([]byte("x"), 127), []byte{}, bytes.Repeat([]byte("x"), 128), bytes.Repeat([]byte("x"), 17000), "a", []byte{}, uint8(2))
	f.Fuzz(func(t *testing.T, path, hint string, leaf, intermediates, key, own []byte, foreignTD string, foreignDER []byte, n uint8) {
		id, err := spiffeid.FromSegments(td, path)
		if err != nil {
			id = td.ID()
		}
		hint = strings.ToValidUTF8(hint, "?")
		svid := &cache.SVID{ID: id, Leaf: leaf, Intermediates: intermediates, Key: key}
		a := x509Answer{own: own}
		want := &workloadpb.X509SVIDResponse{}
		for range n % 8 {
			a.identities = append(a.identities, x509Identity{svid, hint})
			want.Svids = append(want.Svids, &workloadpb.X509SVID{
				SpiffeId: id.String(), X509Svid: slices.Concat(leaf, intermediates), X509SvidKey: key, Bundle: own, Hint: hint,
			})
		}
		bundles := &workloadpb.X509BundlesResponse{}
		if other, err := spiffeid.TrustDomainFromString(foreignTD); err == nil {
			a.federated = []encodedBundle{{other, foreignDER}}
			want.FederatedBundles = map[string][]byte{other.IDString(): foreignDER}
			bundles.Bundles = want.FederatedBundles
		}
		buf := a.encode(a.size())
		defer buf.Free()
		answer := buf.ReadOnlyData()
		got := &workloadpb.X509SVIDResponse{}
		if err := proto.Unmarshal(answer, got); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got, want) || len(answer) != a.size() {
			t.Errorf("got %v, want %v", got, want)
		}
		buf = encodeBundles(x509Bundles, a.federated)
		defer buf.Free()
		gotBundles := &workloadpb.X509BundlesResponse{}
		if err := proto.Unmarshal(buf.ReadOnlyData(), gotBundles); err != nil || !proto.Equal(gotBundles, bundles) {
			t.Errorf("got %v (%v), want %v", gotBundles, err, bundles)
		}
	})
}

// FuzzRequest sends arbitrary requests as a registered and as an unknown
// caller. Whatever they contain, the answer is a status that clients handle, and an
// unknown caller never gets anything.
func FuzzRequest(f *testing.F) {
	m := &minter{}
	s := newSystem(f, func(c *Config) { c.JWT = m })
	s.add(entry("e1", "/one", 1000))
	m.set(s.mintFor("/one"))
	known, unknown := s.client(1000), s.client(1001)
	token := s.ca.token(f, "spiffe://example.org/one", []string{"a"}, time.Hour, nil)
	f.Add("a", "b", "spiffe://example.org/one", token)
	f.Add("", "", "", "")
	f.Add("a\x00b", "b", "spiffe://example.org/../one", "a.b.c")
	head, rest, _ := strings.Cut(token, ".")
	f.Add("a", "a", "x", head+"."+head+"."+rest)
	f.Fuzz(func(t *testing.T, aud1, aud2, id, token string) {
		ctx := withHeader(t.Context())
		for _, c := range []workloadpb.SpiffeWorkloadAPIClient{known, unknown} {
			fetched, fetchErr := c.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{aud1, aud2}, SpiffeId: id})
			validated, validateErr := c.ValidateJWTSVID(ctx, &workloadpb.ValidateJWTSVIDRequest{Audience: aud1, Svid: token})
			for _, err := range []error{fetchErr, validateErr} {
				switch status.Code(err) {
				case codes.OK:
					if c == unknown {
						t.Errorf("an unknown caller got %v, %v", fetched, validated)
					}
				case codes.InvalidArgument, codes.PermissionDenied, codes.Unavailable:
				case codes.Internal: // the client rejects text that is not UTF-8
				case codes.ResourceExhausted: // above maxRequest
				default:
					t.Errorf("got %v", err)
				}
			}
		}
	})
}

// FuzzConnection writes arbitrary bytes to the socket. The server must go on.
func FuzzConnection(f *testing.F) {
	s := newSystem(f, nil)
	s.add(entry("e1", "/one", 1000))
	good := s.client(1000)
	preface := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	f.Add([]byte(preface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
	f.Add([]byte(preface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x05\x01\x04\x00\x00\x00\x01hello"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		c, err := s.lis.dial(ctx, 1001)
		if err != nil {
			t.Fatal(err)
		}
		write(c, data)
		c.Close()
		stream, err := good.FetchX509SVID(withHeader(ctx), &workloadpb.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if err != nil {
			t.Errorf("after %q: %v", data, err)
		}
	})
}

func write(c net.Conn, data []byte) {
	c.SetDeadline(time.Now().Add(time.Second))
	c.Write(data) // the server may close the connection before all is written
}
