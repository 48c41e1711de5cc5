#!/usr/bin/env bash
# An X509Source of go-spiffe stops permanently and silently when a stream ends with Canceled.
#
# Seen with   go-spiffe v2.9.0, gRPC-Go v1.85.0
# Behaviour   After its first answer, an X509Source reconnects if the stream ends with Unavailable,
#             PermissionDenied, Internal or Unimplemented. After Canceled or InvalidArgument it
#             never does. GetX509SVID keeps returning the old SVID without an error, even after
#             it has expired, and the default logger prints nothing.
# Operators   If a proxy or sidecar in front of the socket turns its shutdown into Canceled, the
#             workloads behind it are never renewed again; mTLS fails hours later. Restart such
#             workloads.
# renewd      ends streams with Unavailable when it stops, and with Canceled or InvalidArgument only
#             if the client caused that (tests of internal/agent/workload).
#
# Output seen
#   Unavailable: asked again
#   PermissionDenied: asked again
#   Internal: asked again
#   Unimplemented: asked again
#   Canceled: never asked again; GetX509SVID: an SVID that has expired, error <nil>
#   InvalidArgument: never asked again; GetX509SVID: an SVID that has expired, error <nil>
source "$(dirname "$0")/lib.sh"
go_module github.com/spiffe/go-spiffe/v2@v2.9.0 google.golang.org/grpc@v1.85.0
cat >main.go <<'GO'
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// answer returns an SVID that expires in five seconds, with its key and the bundle.
func answer() *workload.X509SVIDResponse {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	id := must(url.Parse("spiffe://example.org/web"))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(5 * time.Second), URIs: []*url.URL{id},
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	cert := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	return &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: id.String(), X509Svid: cert, X509SvidKey: must(x509.MarshalPKCS8PrivateKey(key)), Bundle: cert,
	}}}
}

// api answers each stream once and ends it with a code.
type api struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	answer *workload.X509SVIDResponse
	code   codes.Code
	asked  chan struct{}
}

func (a *api) FetchX509SVID(_ *workload.X509SVIDRequest, s workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	select {
	case a.asked <- struct{}{}:
	default:
	}
	if err := s.Send(a.answer); err != nil {
		return err
	}
	return status.Error(a.code, "the stream ends")
}

func main() {
	for _, code := range []codes.Code{codes.Unavailable, codes.PermissionDenied, codes.Internal, codes.Unimplemented, codes.Canceled, codes.InvalidArgument} {
		lis := must(net.Listen("unix", code.String()+".sock"))
		a := &api{answer: answer(), code: code, asked: make(chan struct{}, 2)}
		srv := grpc.NewServer()
		workload.RegisterSpiffeWorkloadAPIServer(srv, a)
		go srv.Serve(lis)
		wd := must(os.Getwd())
		source := must(workloadapi.NewX509Source(context.Background(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+wd+"/"+lis.Addr().String()))))
		<-a.asked
		select {
		case <-a.asked:
			fmt.Printf("%s: asked again\n", code)
		case <-time.After(8 * time.Second): // its first pause is one second
			fmt.Printf("%s: never asked again; GetX509SVID: ", code)
			svid, err := source.GetX509SVID()
			if svid != nil && time.Now().After(svid.Certificates[0].NotAfter) {
				fmt.Print("an SVID that has expired, ")
			}
			fmt.Printf("error %v\n", err)
		}
		source.Close()
		srv.Stop()
	}
}
GO
go run . >seen 2>&1
expect <<'SEEN'
Unavailable: asked again
PermissionDenied: asked again
Internal: asked again
Unimplemented: asked again
Canceled: never asked again; GetX509SVID: an SVID that has expired, error <nil>
InvalidArgument: never asked again; GetX509SVID: an SVID that has expired, error <nil>
SEEN
