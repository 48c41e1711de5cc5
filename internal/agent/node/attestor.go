package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// Attestor is one way of proving to the server which node this is. Its methods
// are called by one goroutine at a time.
type Attestor interface {
	// Type is the name of the node attestor at the server.
	Type() string
	// Payload is what the server is sent first. It is made anew for each
	// attempt, so that a proof which was replaced meanwhile is found. It must
	// not use up anything. When nothing is configured that could prove the
	// node, ever, the error is [ErrNoProof].
	Payload(ctx context.Context) ([]byte, error)
	// Respond answers one challenge of the server.
	Respond(ctx context.Context, challenge []byte) ([]byte, error)
}

// ErrNoProof says that the configuration holds nothing to prove the node with,
// so that trying again is of no use.
var ErrNoProof = errors.New("nothing is configured that proves the node")

// maxToken is far above what a server makes (36 bytes).
const maxToken = 4 << 10

type joinToken struct{ value, file string }

// JoinToken proves a node by a token that the server issued for it and takes
// once. The token is value or, when that is empty, the content of file without
// surrounding white space.
func JoinToken(value, file string) Attestor { return joinToken{strings.TrimSpace(value), file} }

func (joinToken) Type() string { return "join_token" }

func (j joinToken) Payload(context.Context) ([]byte, error) {
	if j.value != "" {
		return []byte(j.value), nil
	}
	if j.file == "" {
		return nil, fmt.Errorf("%w: set join_token or join_token_file to a token that the server issued for this node", ErrNoProof)
	}
	f, err := os.Open(j.file)
	if err != nil {
		return nil, fmt.Errorf("read join_token_file: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return nil, fmt.Errorf("read join_token_file: %w", err)
	}
	token := strings.TrimSpace(string(b))
	switch {
	case len(b) > maxToken:
		return nil, fmt.Errorf("join_token_file %s is larger than %d bytes: it must hold one token and nothing else", j.file, maxToken)
	case token == "":
		return nil, fmt.Errorf("join_token_file %s is empty: put a token into it that the server issued for this node; a systemd credential is read when the service starts, so restart it then", j.file)
	case strings.ContainsAny(token, " \t\r\n"):
		return nil, fmt.Errorf("join_token_file %s holds more than one word: it must hold one token and nothing else", j.file)
	}
	return []byte(token), nil
}

func (joinToken) Respond(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("the server sent a challenge, which there is none of with join_token")
}
