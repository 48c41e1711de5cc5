#!/usr/bin/env bash
# SPIRE's API has a method that its policy does not let agents call, with an error log line each time.
#
# Seen with   SPIRE 1.13.3 with spire-api-sdk v1.15.3 (fixed in SPIRE 1.14.3)
# Behaviour   Agent.PostStatus is part of the Server API. The default policy has no rule for it, so
#             an attested agent gets PermissionDenied without details, and the server logs the
#             error "Failed to authenticate caller".
# Operators   Programs that use the API of a newer SPIRE fill the log of an older server with errors
#             that look like failed logins.
# renewd      takes that as "not supported" and tries again after ten minutes
#             (TestServerWithoutStatuses in internal/agent).
#
# Output seen
#   attested: spiffe://example.org/spire/agent/join_token/TOKEN
#   PostStatus: PermissionDenied, authorization denied for method /spire.api.server.agent.v1.Agent/PostStatus, 0 details
#   errors in the server's log: 1
source "$(dirname "$0")/lib.sh"
spire 1.13.3
mkdir client && cd client
go_module github.com/spiffe/spire-api-sdk@v1.15.3 google.golang.org/grpc@v1.85.0
cat >main.go <<'GO'
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"time"

	agent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// dial connects to the server of this script, whom there is no need to verify.
func dial(own ...tls.Certificate) agent.AgentClient {
	config := &tls.Config{InsecureSkipVerify: true, Certificates: own}
	return agent.NewAgentClient(must(grpc.NewClient("127.0.0.1:"+os.Args[1], grpc.WithTransportCredentials(credentials.NewTLS(config)))))
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	csr := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))
	stream := must(dial().AttestAgent(ctx))
	params := &agent.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "join_token", Payload: []byte(os.Args[2])},
		Params: &agent.AgentX509SVIDParams{Csr: csr},
	}
	if err := stream.Send(&agent.AttestAgentRequest{Step: &agent.AttestAgentRequest_Params_{Params: params}}); err != nil {
		panic(err)
	}
	svid := must(stream.Recv()).GetResult().GetSvid()
	fmt.Printf("attested: spiffe://%s%s\n", svid.GetId().GetTrustDomain(), svid.GetId().GetPath())
	_, err := dial(tls.Certificate{Certificate: svid.GetCertChain(), PrivateKey: key}).PostStatus(ctx, &agent.PostStatusRequest{})
	s := status.Convert(err)
	fmt.Printf("PostStatus: %v, %s, %d details\n", s.Code(), s.Message(), len(s.Details()))
}
GO
cd ..
spire_server spire
token=$(api spire token generate | sed -n 's/^Token: //p')
{
	(cd client && go run . "$(cat ../spire.port)" "$token") | sed "s/$token/TOKEN/"
	echo "errors in the server's log: $(grep -c 'level=error.*Failed to authenticate caller.*PostStatus' spire.log)"
} >seen
expect <<'SEEN'
attested: spiffe://example.org/spire/agent/join_token/TOKEN
PostStatus: PermissionDenied, authorization denied for method /spire.api.server.agent.v1.Agent/PostStatus, 0 details
errors in the server's log: 1
SEEN
