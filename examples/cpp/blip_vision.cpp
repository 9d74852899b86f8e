// SPDX-License-Identifier: Apache-2.0
// The pruned vision tower of a BLIP that madtp has saved, on the CPU, without Python:
//
//   blip_vision MODEL_FOLDER IMAGES.safetensors [--threads N] [--out ROWS.f32]
//
// IMAGES holds `pixel_values` (B, 3, H, W) in float32, as the image processor of the model makes them. It
// prints how many tokens of each image are left after every layer and a checksum of the rows that leave the
// tower, (tokens left, channels), and writes these to --out.
#include <cstdio>
#include <memory>
#include <thread>

#include "layers.h"

namespace example {
namespace {

constexpr long long kMaxSize = 1 << 16;

struct Sizes {
  std::int64_t channels, hidden, heads, layers, image, patch;
  double eps;

  explicit Sizes(const Json& c)
      : channels(c["hidden_size"].integer(16, kMaxSize)),
        hidden(c["intermediate_size"].integer(16, kMaxSize)),
        heads(c["num_attention_heads"].integer(1, kMaxSize)),
        layers(c["num_hidden_layers"].integer(1, 1024)),
        image(c["image_size"].integer(1, kMaxSize)),
        patch(c["patch_size"].integer(1, image)),
        eps(c["layer_norm_eps"].number()) {
    if (channels % heads != 0) throw std::runtime_error(c.where() + ": heads must divide hidden_size");
    if (c["hidden_act"].string() != "gelu")
      throw std::runtime_error(c.where() + ": hidden_act must be gelu, got " + c["hidden_act"].string());
    if (3 * patch * patch % 16 != 0 || channels % 16 != 0)
      throw std::runtime_error(c.where() + ": 3 patch_size^2 and hidden_size must be multiples of 16");
  }

  std::int64_t side() const { return image / patch; }
  std::int64_t positions() const { return side() * side() + 1; }
};

struct Block {
  LayerNorm norm1, norm2;
  PackedLinear qkv, projection, fc1, fc2;
};

class Tower {
 public:
  Tower(const std::string& folder, int threads)
      // In braces config.json is read first, and is what a message names for a folder of another kind.
      : Tower{read_json(folder + "/config.json"), Safetensors(folder + "/model.safetensors"), threads} {}

  // pixels (B, 3, image, image) -> the rows that leave the tower; what is printed goes to stdout.
  Batch run(const Floats& pixels, std::int64_t images) const {
    Batch batch = embedded(pixels, images);
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      run(blocks_[i], &batch);
      std::printf("layer %zu:", i);
      for (std::int64_t b = 0; b < images; ++b)
        std::printf(" %d", batch.cu_seqlens[std::size_t(b) + 1] - batch.cu_seqlens[std::size_t(b)]);
      std::printf("\n");
    }
    return {norm_.run(batch, threads_), batch.cu_seqlens};
  }

  const Sizes& sizes() const { return sizes_; }

 private:
  Tower(const Json& config, const Safetensors& file, int threads)
      : sizes_(config["vision_config"]), threads_(threads) {
    if (!config.has("quantization_config"))
      throw std::runtime_error(config.where() +
                               " must have a quantization_config: save a BLIP that madtp has patched");
    const Json& settings = config["quantization_config"];
    if (settings["quant_method"].string() != "madtp")
      throw std::runtime_error(settings.where() + ": must be of madtp, got " +
                               settings["quant_method"].string());
    settings["version"].integer(6, 6);
    const Json& branch = settings["branches"]["vision"];
    if (branch["selection"].string() != "instance")
      throw std::runtime_error(branch.where() + ": selection must be instance, got " +
                               branch["selection"].string());
    temperature_ = branch["temperature"].number();

    const std::int64_t c = sizes_.channels, patch = 3 * sizes_.patch * sizes_.patch;
    const std::string in = "vision_model.embeddings.";
    class_ = file.read<float>(in + "class_embedding", {1, 1, c});
    position_ = file.read<float>(in + "position_embedding", {1, sizes_.positions(), c});
    patches_ = dense("patch_embedding",
                     file.read<float>(in + "patch_embedding.weight", {c, 3, sizes_.patch, sizes_.patch}),
                     file.read<float>(in + "patch_embedding.bias", {c}), c, patch);
    for (std::int64_t i = 0; i < sizes_.layers; ++i)
      blocks_.push_back(
          block(file, settings["packed"], "vision_model.encoder.layers." + std::to_string(i) + "."));
    norm_ = norm(file, "vision_model.post_layernorm");
    if (temperature_ > 0) read_alignment(file);
  }

  // The alignment tokens of MAG, which all branches share, and the map of this one.
  void read_alignment(const Safetensors& file) {
    const std::string name = "madtp_guide.alignment_tokens", map = "madtp_guide.maps.vision";
    const std::vector<std::int64_t>& shape = file.shape(name);
    if (shape.size() != 2 || shape[0] < 1 || shape[0] > kMaxSize || shape[1] > kMaxSize || shape[1] % 16 != 0)
      throw std::runtime_error(name + ": must be (K, d) with d a multiple of 16");
    alignment_tokens_ = shape[0];
    if (file.has(map + ".weight"))
      map_ = dense(map, file.read<float>(map + ".weight", {shape[1], sizes_.channels}),
                   file.read<float>(map + ".bias", {shape[1]}), shape[1], sizes_.channels);
    else if (shape[1] != sizes_.channels)
      throw std::runtime_error(map + ": is missing, and d is not hidden_size");
    logits_ = dense(name, file.read<float>(name, shape), {}, shape[0], shape[1]);
  }

  std::unique_ptr<DenseLinear> dense(const std::string& name, const Floats& weight, Floats bias,
                                     std::int64_t out, std::int64_t in) const {
    return std::make_unique<DenseLinear>(name, weight, std::move(bias), out, in, threads_);
  }

  LayerNorm norm(const Safetensors& file, const std::string& name) const {
    return {file.read<float>(name + ".weight", {sizes_.channels}),
            file.read<float>(name + ".bias", {sizes_.channels}), sizes_.eps};
  }

  Block block(const Safetensors& file, const Json& packed, const std::string& in) const {
    const auto linear = [&](const std::string& name, std::int64_t out_features, std::int64_t in_features) {
      if (!packed.has(in + name))
        throw std::runtime_error(in + name +
                                 ": is not packed; this example runs blocks of packed layers alone");
      const Json& layer = packed[in + name];
      if (!layer["scale"].is_null() || layer["activation"].is_null() != (name != "mlp.fc1"))
        throw std::runtime_error(layer.where() +
                                 ": must have taken over the activation of fc1, and nothing else");
      return PackedLinear(file, in + name, layer["scheme"].string(), out_features, in_features, threads_);
    };
    const std::int64_t c = sizes_.channels;
    return {norm(file, in + "layer_norm1"),      norm(file, in + "layer_norm2"),
            linear("self_attn.qkv", 3 * c, c),   linear("self_attn.projection", c, c),
            linear("mlp.fc1", sizes_.hidden, c), linear("mlp.fc2", c, sizes_.hidden)};
  }

  Batch embedded(const Floats& pixels, std::int64_t images) const {
    const std::int64_t p = sizes_.patch, side = sizes_.side(), size = sizes_.image, c = sizes_.channels;
    Floats columns;
    columns.reserve(std::size_t(images * side * side * 3 * p * p));
    for (std::int64_t b = 0; b < images; ++b)
      for (std::int64_t row = 0; row < side; ++row)
        for (std::int64_t column = 0; column < side; ++column)
          for (std::int64_t colour = 0; colour < 3; ++colour)
            for (std::int64_t y = row * p; y < (row + 1) * p; ++y)
              for (std::int64_t x = column * p; x < (column + 1) * p; ++x)
                columns.push_back(pixels[std::size_t(((b * 3 + colour) * size + y) * size + x)]);
    const Floats patches = patches_->run(columns, threads_);
    Batch batch{{}, {0}};
    for (std::int64_t b = 0; b < images; ++b) {
      for (std::int64_t i = 0; i < sizes_.positions(); ++i)
        for (std::int64_t j = 0; j < c; ++j) {
          const std::int64_t patch = (b * side * side + i - 1) * c + j;
          batch.x.push_back((i == 0 ? class_[std::size_t(j)] : patches[std::size_t(patch)]) +
                            position_[std::size_t(i * c + j)]);
        }
      batch.cu_seqlens.push_back(std::int32_t((b + 1) * sizes_.positions()));
    }
    return batch;
  }

  void run(const Block& block, Batch* batch) const {
    const bool prunes = temperature_ > 0;
    const Floats qkv =
        block.qkv.run(block.norm1.run(*batch, threads_), madtp::Activation::none, nullptr, threads_);
    const Attention attention = attend(*batch, qkv, sizes_.channels, sizes_.heads, prunes, threads_);
    const Floats x = block.projection.run(attention.out, madtp::Activation::none, batch->x.data(), threads_);
    Selected selected(*batch);
    if (prunes) select(*batch, attention, &selected);
    const Floats normed = block.norm2.prune(batch, x, selected, threads_);
    const Floats hidden = block.fc1.run(normed, madtp::Activation::gelu, nullptr, threads_);
    batch->x = block.fc2.run(hidden, madtp::Activation::none, batch->x.data(), threads_);
  }

  void select(const Batch& batch, const Attention& attention, Selected* selected) const {
    const Floats logits = logits_->run(map_ ? map_->run(batch.x, threads_) : batch.x, threads_);
    const madtp::ScoreInputs inputs{logits.data(),
                                    madtp::DType::float32,
                                    logits_->out_features(),
                                    alignment_tokens_,
                                    batch.cu_seqlens.data(),
                                    batch.tokens(),
                                    batch.size(),
                                    nullptr};
    Floats importance(std::size_t(batch.tokens()));
    check(madtp::cpu::score_and_select(attention.summary.data(), attention.received.data(), inputs,
                                       temperature_, importance.data(), selected->outputs(), threads_),
          "score_and_select");
  }

  Sizes sizes_;
  int threads_;
  double temperature_ = 0;
  std::int64_t alignment_tokens_ = 0;
  Floats class_, position_;
  std::unique_ptr<DenseLinear> patches_, map_, logits_;
  std::vector<Block> blocks_;
  LayerNorm norm_;
};

// FNV-1a of the bytes.
unsigned long long checksum(const Floats& rows) {
  std::string bytes(rows.size() * sizeof(float), '\0');
  if (!rows.empty()) std::memcpy(bytes.data(), rows.data(), bytes.size());
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  return hash;
}

int run(const std::vector<std::string>& arguments) {
  const char* usage = "usage: blip_vision MODEL_FOLDER IMAGES.safetensors [--threads N] [--out ROWS.f32]";
  if (arguments.size() < 2 || arguments.size() % 2 != 0) throw std::runtime_error(usage);
  int threads = int(std::max(1u, std::thread::hardware_concurrency()));
  std::string out;
  for (std::size_t i = 2; i < arguments.size(); i += 2) {
    if (arguments[i] == "--threads")
      threads = int(Json::parse(arguments[i + 1], "--threads").integer(1, 1024));
    else if (arguments[i] == "--out")
      out = arguments[i + 1];
    else
      throw std::runtime_error(usage);
  }
  const Tower tower(arguments[0], threads);
  const Safetensors images(arguments[1]);
  const std::vector<std::int64_t>& shape = images.shape("pixel_values");
  const std::int64_t count = shape.empty() ? 0 : shape[0], size = tower.sizes().image;
  if (count > kMaxSize) throw std::runtime_error("pixel_values: must be of at most 65536 images");
  const Batch rows = tower.run(images.read<float>("pixel_values", {count, 3, size, size}), count);
  std::printf("%lld rows, checksum %016llx\n", static_cast<long long>(rows.tokens()), checksum(rows.x));
  if (!out.empty()) {
    std::ofstream file(out, std::ios::binary);
    file.write(reinterpret_cast<const char*>(rows.x.data()), std::streamsize(rows.x.size() * sizeof(float)));
    if (!file.flush()) throw std::runtime_error(out + ": cannot be written");
  }
  return 0;
}

}  // namespace
}  // namespace example

int main(int count, char** values) {
  try {
    return example::run({values + 1, values + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
