package admin

import (
	"path"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/keyset"
)

// Backup implements the service.
func (s *Service) Backup(_ *api.BackupRequest, stream grpc.ServerStreamingServer[api.BackupResponse]) error {
	size, err := s.config.Backup(stream.Context(), chunkWriter{stream})
	if err != nil {
		return statusError(err)
	}
	return stream.Send(&api.BackupResponse{Size: size})
}

// chunkWriter sends each write as a message.
type chunkWriter struct {
	stream grpc.ServerStreamingServer[api.BackupResponse]
}

func (p chunkWriter) Write(b []byte) (int, error) {
	if err := p.stream.Send(&api.BackupResponse{Data: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// interceptBackup logs a backup, the only streaming call. admit sets its deadline.
func (s *Service) interceptBackup(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	begin := s.now()
	counted := &countedStream{ServerStream: stream}
	err := handler(srv, counted)
	log := s.log.With("actor", keyset.Actor(stream.Context()), "operation", path.Base(info.FullMethod),
		"bytes", counted.bytes, "outcome", status.Code(err).String(), "duration", s.now().Sub(begin))
	if err != nil {
		log.Warn("operator backup failed", "error", status.Convert(err).Message())
		return err
	}
	log.Info("operator backup completed")
	return nil
}

// countedStream counts the bytes that were sent.
type countedStream struct {
	grpc.ServerStream
	bytes int64
}

func (c *countedStream) SendMsg(m any) error {
	err := c.ServerStream.SendMsg(m)
	if part, ok := m.(*api.BackupResponse); ok && err == nil {
		c.bytes += int64(len(part.GetData()))
	}
	return err
}
