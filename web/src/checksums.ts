/** Checksums of the file format. */

const CRC16_TABLE = Uint16Array.from({ length: 256 }, (_, byte) => {
  let crc = byte << 8;
  for (let bit = 0; bit < 8; bit++) crc = crc & 0x8000 ? (crc << 1) ^ 0x1021 : crc << 1;
  return crc;
});

const CRC32_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  return crc;
});

/** CRC-16 with polynomial 0x1021, not reflected: `binascii.crc_hqx` of Python. */
export function crc16(data: Uint8Array, start = 0): number {
  let crc = start;
  for (const byte of data) crc = ((crc << 8) & 0xffff) ^ CRC16_TABLE[(crc >> 8) ^ byte];
  return crc;
}

/** CRC-32 of zlib and PNG; `start` is the checksum of what came before. */
export function crc32(data: Uint8Array, start = 0): number {
  let crc = ~start;
  for (let i = 0; i < data.length; i++) crc = (crc >>> 8) ^ CRC32_TABLE[(crc ^ data[i]) & 0xff];
  return ~crc >>> 0;
}
